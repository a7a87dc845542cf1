"""Which implementation computes the operations: fused kernels, or the equations in plain torch."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cbam.errors import ConfigError, first_line
from cbam.ops import cpu
from cbam.ops.reference import FLOATS, transformed

_log = logging.getLogger("cbam")
_IMPLEMENTATIONS = ("reference", "fused")
_MOST_TOLD = 100  # shapes are among the reasons
_OLDEST = 7  # compute capability; the ticket that `convolve` draws needs it, and `probe` does not try that
_known: dict[torch.device, str] = {}
_told: set[str] = set()
# Of the whole process: activation checkpointing computes a forward anew in a thread of autograd's.
_choice = ""
_choices: dict[object, str] = {}  # of the blocks that are open, in whatever order threads leave them
_lock = threading.Lock()


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Compute attention inside the `with` block by "reference" or by "fused", in all threads.

    The default, outside any block, is the fastest that the input allows. An explicit choice never falls
    back: with "fused", what no kernel takes is refused with the reason.

    Raises:
        ConfigError: an unknown implementation; inside the block, an input that no kernel takes.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ConfigError(f'using({implementation!r}): expected "reference" or "fused"')
    block = object()
    _choose(block, implementation)
    try:
        yield
    finally:
        _choose(block, "")


def _choose(block: object, implementation: str) -> None:
    """Open a block with a choice, or close it by none; the newest that is open has its way."""
    global _choice
    with _lock:
        if implementation:
            _choices[block] = implementation
        else:
            del _choices[block]
        _choice = next(reversed(_choices.values()), "")


def fused(x: Tensor, obstacle: str = "") -> bool:
    """Whether attention on `x`, (N, C, H, W), runs by fused kernels.

    Args:
        obstacle: what of the module no kernel knows, if anything.

    Raises:
        ConfigError: `using("fused")` is in effect, and they cannot.
    """
    if _choice == "reference":
        return False
    reason = obstacle or _obstacle(x)
    if reason and _choice == "fused":
        raise ConfigError(f'using("fused"): {reason}; leave the choice out, or take "reference"')
    if reason and not torch.compiler.is_compiling():
        _tell(reason)
    return not reason


def _tell(reason: str) -> None:
    """Why the equation runs, once for each reason."""
    if reason not in _told and len(_told) < _MOST_TOLD:
        _told.add(reason)
        _log.info("attention runs as plain torch operations: %s", reason)


def _obstacle(x: Tensor) -> str:
    """Why kernels do not take `x`, or nothing."""
    # The flag itself: to the compiler of torch 2.10 is_exporting() is always true.
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return "what is exported holds no operator of ours"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}, no plain tensor"
    if x.dtype not in FLOATS or x.dim() != 4 or x.numel() == 0:
        return f"x is {x.dtype} of shape {tuple(x.shape)}"
    # A compiler knows how to trace every transform but the derivative in forward mode.
    if forward_ad._current_level >= 0 or (not torch.compiler.is_compiling() and transformed()):
        return "inside torch.func and forward-mode transforms the equation is used"
    return _device_obstacle(x.device)


def _device_obstacle(device: torch.device) -> str:
    """Why no kernels run on `device`, or nothing; found out once, and said then."""
    if device not in _known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return ""  # nothing can be tried while a graph is captured
        _known[device] = reason = _missing(device)
        if reason and device.type in ("cpu", "cuda"):
            _log.warning("attention runs as plain torch operations on %s: %s", device, reason)
    return _known[device]


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
_device_obstacle._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _missing(device: torch.device) -> str:
    if device.type == "cpu":
        return cpu.missing()
    if device.type != "cuda" or torch.version.hip:
        return f"there are no kernels for {'ROCm' if device.type == 'cuda' else device.type}"
    try:
        major, minor = torch.cuda.get_device_capability(device)
        if major < _OLDEST:
            return f"the kernels need compute capability {_OLDEST}.0, and this GPU has {major}.{minor}"
        from cbam.ops import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

        triton_kernels.probe(device)
    except torch.OutOfMemoryError:
        raise  # it says nothing about the kernels
    except Exception as error:  # a compiler, a driver or a cache folder fails in any way it likes
        return f"the kernels do not run ({type(error).__name__}: {first_line(error, 200)})"
    return ""
