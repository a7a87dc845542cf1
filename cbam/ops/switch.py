"""The choice of implementation: fused kernels or the equations in plain torch."""

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
_MAX_LOGGED = 100  # reasons contain shapes, so their number has no bound
# Compute capability that the atomic of `convolve` needs; `probe` does not run that kernel.
_MIN_CAPABILITY = 7
_known: dict[torch.device, str] = {}
_logged: set[str] = set()
# Global to the process: activation checkpointing recomputes a forward in a thread of autograd.
_choice = ""
_choices: dict[object, str] = {}  # of the open blocks; threads may leave them in any order
_lock = threading.Lock()


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Inside the `with` block, compute attention with "reference" or with "fused", in all threads.

    Outside any block, the fastest implementation that supports the input is used. An explicit choice never
    falls back: with "fused", an input that no kernel supports is an error, which gives the reason.

    Raises:
        ConfigError: an unknown implementation; inside the block, an input that no kernel supports.
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
    """Open a block with a choice, or close it with an empty one; the newest open block decides."""
    global _choice
    with _lock:
        if implementation:
            _choices[block] = implementation
        else:
            del _choices[block]
        _choice = next(reversed(_choices.values()), "")


def fused(x: Tensor, obstacle: str = "") -> bool:
    """Whether attention on `x`, (N, C, H, W), runs in fused kernels.

    Args:
        obstacle: why no kernel supports the module; empty if one does.

    Raises:
        ConfigError: it cannot, and `using("fused")` is in effect.
    """
    if _choice == "reference":
        return False
    reason = obstacle or _obstacle(x)
    if reason and _choice == "fused":
        raise ConfigError(f'using("fused"): {reason}; use "reference", or let cbam choose')
    if reason and not torch.compiler.is_compiling():
        _log_once(reason)
    return not reason


def _log_once(reason: str) -> None:
    """Log why the equation is used, once per reason."""
    if reason not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(reason)
        _log.info("attention runs as plain torch operations: %s", reason)


def _obstacle(x: Tensor) -> str:
    """Why no kernel supports `x`; empty if one does."""
    # The flag itself: under the compiler of torch 2.10, is_exporting() is always true.
    if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
        return "exported graphs contain no operators of this package"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}, not a plain tensor"
    if x.dtype not in FLOATS or x.dim() != 4 or x.numel() == 0:
        return f"x is {x.dtype} of shape {tuple(x.shape)}"
    # A compiler traces every transform except forward-mode differentiation.
    if forward_ad._current_level >= 0 or (not torch.compiler.is_compiling() and transformed()):
        return "kernels do not support torch.func transforms and forward-mode differentiation"
    return _device_obstacle(x.device)


def _device_obstacle(device: torch.device) -> str:
    """Why no kernels run on `device`, empty if they do; determined and logged once."""
    if device not in _known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The driver loads no Triton kernel during a capture, and the attempt would invalidate the graph.
            return "a CUDA graph is being captured before any kernel is loaded; run the module once first"
        _known[device] = reason = _missing(device)
        if reason and device.type in ("cpu", "cuda"):
            _log.warning("attention runs as plain torch operations on %s: %s", device, reason)
    return _known[device]


# As torch.compiler.assume_constant_result does, without importing the whole compiler.
_device_obstacle._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _missing(device: torch.device) -> str:
    if device.type == "cpu":
        return cpu.missing()
    if device.type != "cuda" or torch.version.hip:
        return f"there are no kernels for {'ROCm' if device.type == 'cuda' else device.type}"
    try:
        major, minor = torch.cuda.get_device_capability(device)
        if major < _MIN_CAPABILITY:
            return (
                f"the kernels need compute capability {_MIN_CAPABILITY}.0, and this GPU has {major}.{minor}"
            )
        from cbam.ops import triton_kernels  # pyright: ignore[reportAttributeAccessIssue]

        triton_kernels.probe(device)
    except torch.OutOfMemoryError:
        raise  # this says nothing about the kernels
    except Exception as error:  # a compiler, a driver or a cache folder may raise anything
        return f"the kernels failed to run ({type(error).__name__}: {first_line(error, 200)})"
    return ""
