"""The side effects of a forward: detected, and undone.

A user's forward is run here for inspection. It may draw random numbers, update a buffer or store what it has
computed. None of that may remain, and a forward generated from its graph would leave it out.
"""

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

DRAWS = "draws random numbers"


@contextlib.contextmanager
def undrawn(seed: int | None = None) -> Iterator[list[str]]:
    """For a `with`: restores the random generators of Python, NumPy and, on the CPU, torch.

    Args:
        seed: what they are seeded with inside, if given.

    Yields:
        a list, which holds DRAWS after the `with` if anything was drawn.
    """
    effects: list[str] = []
    numpy: Any = sys.modules.get("numpy.random")  # if it has been imported
    python, torchs, numpys = _states(numpy)
    if seed is not None:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        if numpy:
            numpy.seed(seed)
    begin = _states(numpy)
    try:
        yield effects
    finally:
        if not _same_states(begin, _states(numpy)):
            effects.append(DRAWS)
        random.setstate(python)
        torch.set_rng_state(torchs)
        if numpy:
            numpy.set_state(numpys)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """For a `with`: seeds torch's generators of the CPU, and of `device` if that is a GPU.

    They are restored afterwards. Those of other GPUs, which `torch.manual_seed` would seed too, are left
    alone.
    """
    own = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(own):
        torch.default_generator.manual_seed(seed)
        for gpu in own:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _states(numpy: Any) -> tuple[Any, Tensor, Any]:
    return random.getstate(), torch.get_rng_state(), numpy.get_state() if numpy else None


def _same_states(a: tuple[Any, Tensor, Any], b: tuple[Any, Tensor, Any]) -> bool:
    # NumPy's is a tuple with an array in it, which compares as a list
    numpys = [state and (state[1].tolist(), state[2:]) for state in (a[2], b[2])]
    return a[0] == b[0] and torch.equal(a[1], b[1]) and numpys[0] == numpys[1]


@contextlib.contextmanager
def unchanged(module: nn.Module, called: str = "") -> Iterator[list[str]]:
    """For a `with`: restores the attributes of `module` itself, and the values of its buffers.

    A cache that a trace has filled would poison the next run. `called` is the module's name in its block.

    Yields:
        a list, which says after the `with` what was changed.
    """
    effects: list[str] = []
    attributes = dict(vars(module))
    contents = [(n, v, v.copy()) for n, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)]
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
        of = f"self.{called}." if called else "self."
        effects += [f"changes {of}{name}" for name in names if name != "training"]
        now.clear()
        now.update(attributes)
        for _, container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for _, buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """For a `with`: restores the training or eval mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """For a `with`: `model.eval()`; the mode of every module is restored afterwards."""
    with modes_restored(model):
        model.eval()
        yield


def _items(container: Any) -> list[tuple[Any, int]]:
    """The contents of a container, by identity: they may be tensors, which do not compare."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return [(None, id(value)) for value in container]
