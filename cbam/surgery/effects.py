"""Detect and undo the side effects of a forward.

A user's forward, run for inspection, may draw random numbers, update a buffer or store what it computed. None
of that may remain, and a forward generated from its graph would leave it out.
"""

import contextlib
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

DRAWS = "draws random numbers"
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextlib.contextmanager
def rng_restored(seed: int | None = None) -> Iterator[list[str]]:
    """Context manager: restores the random generators of Python, NumPy and torch (CPU).

    Args:
        seed: if given, the generators are seeded with it.

    Yields:
        a list that contains DRAWS after the `with` if random numbers were drawn.
    """
    effects: list[str] = []
    numpy: Any = sys.modules.get("numpy.random")  # if it has been imported
    python_state, torch_state, numpy_state = _rng_states(numpy)
    if seed is not None:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)  # only the CPU's
        if numpy:
            numpy.seed(seed)
    begin = _rng_states(numpy)
    try:
        yield effects
    finally:
        if not _same_rng_states(begin, _rng_states(numpy)):
            effects.append(DRAWS)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy:
            numpy.set_state(numpy_state)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context manager: seeds torch's generators of the CPU, and of `device` if that is a GPU.

    They are restored afterwards. Other GPUs, which `torch.manual_seed` would seed too, are not touched.
    """
    own = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(own):
        torch.default_generator.manual_seed(seed)
        for gpu in own:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _rng_states(numpy: Any) -> tuple[Any, Tensor, Any]:
    return random.getstate(), torch.get_rng_state(), numpy.get_state() if numpy else None


def _same_rng_states(a: tuple[Any, Tensor, Any], b: tuple[Any, Tensor, Any]) -> bool:
    # a NumPy state is a tuple with an array, which is compared as a list
    numpy_states = [state and (state[1].tolist(), state[2:]) for state in (a[2], b[2])]
    return a[0] == b[0] and torch.equal(a[1], b[1]) and numpy_states[0] == numpy_states[1]


@contextlib.contextmanager
def state_restored(module: nn.Module, path: str = "") -> Iterator[list[str]]:
    """Context manager: restores the attributes of `module` itself, and the values of its buffers.

    A cache filled by a trace would break the next run. `path` is the module's name in its block.

    Yields:
        a list that states after the `with` what was changed.
    """
    effects: list[str] = []
    attributes = dict(vars(module))
    contents = _containers(attributes)
    buffers = [
        (name, b, b._version, b.detach().clone())
        for name, b in module._buffers.items()
        if b is not None and not is_lazy(b) and not b.is_meta and not b.is_inference()
    ]
    try:
        yield effects
    finally:
        now = vars(module)
        names = [n for n in {**attributes, **now} if attributes.get(n, effects) is not now.get(n, effects)]
        names += [n for n, container, content in contents if _items(container) != _items(content)]
        names += [n for n, buffer, version, _ in buffers if buffer._version != version]
        of = f"self.{path}." if path else "self."
        effects += [f"changes {of}{name}" for name in names if name != "training"]
        now.clear()
        now.update(attributes)
        for _, container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list | deque) else container.update(content)
        with torch.no_grad():
            for _, buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Context manager: restores the training or eval mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: calls `model.eval()`, and restores the mode of every module afterwards."""
    with modes_restored(model):
        model.eval()
        yield


def _containers(attributes: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The containers in attributes, also inside others: the attribute's name, the container and a copy."""
    found: dict[int, tuple[str, Any, Any]] = {}
    pending = [*attributes.items()]
    for name, value in pending:  # grows in the loop
        if type(value) in _CONTAINERS and id(value) not in found:
            found[id(value)] = name, value, value.copy()
        elif type(value) is not tuple:
            continue
        pending += [(name, inner) for inner in (value.values() if isinstance(value, dict) else value)]
    return [*found.values()]


def _items(container: Any) -> list[tuple[Any, int]]:
    """The contents of a container by identity, since they may be tensors, which `==` does not compare."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return [(None, id(value)) for value in container]
