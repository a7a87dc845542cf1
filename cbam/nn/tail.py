"""Fused attention, on its own or as one operation with the norm, the add and the ReLU of a residual block.

The end of a residual block, `relu(attention(norm(x)) + shortcut)`, is four operations, each of which reads
the whole map. Here the norm and the attention are deferred as a `Pending` until the add and the ReLU have
been called; then all four run as one. In inference the norm at the end of the shortcut is deferred too, and
joins them. Any other use of a `Pending` gets the tensor that it represents.
"""

import sys
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from cbam import ops
from cbam.ops import Channel, Norm, Spatial
from cbam.ops.reference import transformed

_ADDS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__} | _ADDS_IN_PLACE
_RELUS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_HALVES = (torch.float16, torch.bfloat16)
# What the kernels replace; None if it has been patched already. It may also be patched later.
_FORWARD, _FUNCTION = (
    function if function.__module__.startswith("torch.nn.") else None
    for function in (nn.BatchNorm2d.forward, F.batch_norm)
)


class Fusable(Protocol):
    """Attention that the kernels support."""

    known_forward: Any  # the forward that the kernels implement; a subclass with another one is just called

    def obstacle(self) -> str:
        """Why no kernel supports this module; empty if one does."""
        ...

    def check(self, x: Tensor) -> None:
        """Raise if `x` does not fit the module."""
        ...

    def operands(self, x: Tensor) -> tuple[Channel | None, Spatial | None]:
        """The operands of the kernels; increments `num_batches_tracked` if statistics are tracked."""
        ...

    def over(self, x: Tensor) -> Tensor:
        """`forward` for an `x` that nothing reads afterwards, not even a backward: it may be overwritten."""
        ...


def refined(attention: Fusable, x: Tensor) -> Tensor | None:
    """`attention` on a map (N, C, H, W) or (C, H, W) by fused kernels; None if they do not support it."""
    if not isinstance(x, Tensor):
        return None
    obstacle = attention.obstacle()
    if not obstacle and x.dim() not in (3, 4):
        return None  # the equation raises the error
    maps = x.unsqueeze(0) if x.dim() == 3 else x
    if not ops.fused(maps, obstacle):
        return None
    attention.check(maps)
    channel, spatial = attention.operands(maps)
    out = ops.tail(maps, channel=channel, spatial=spatial)
    return out if x.dim() == 4 else out.squeeze(0)


def begin(norm: nn.Module, attention: nn.Module, x: Tensor, block: nn.Module | None = None) -> Tensor:
    """`attention(norm(x))`: a `Pending` if the add and the ReLU that follow can join it, else computed now.

    The value may be used only once, since computing it updates the running statistics.

    Args:
        block: the block that ends this way, if nothing else in it reads the value or the sum. The result may
            then overwrite `x`, if nothing else holds its memory.
    """
    if (
        getattr(type(attention), "known_forward", None) is not type(attention).forward
        or type(x) is not Tensor
    ):
        return attention(norm(x))
    fusable: Any = attention
    exclusive = block is not None and unseen(block)
    if (
        x.dim() == 4
        and ops.fused(x, fusable.obstacle())
        and not _norm_obstacle(norm, x)
        and not watched(attention)
        and not _has_function_mode()
    ):
        return Pending(norm, attention, x, unseen=exclusive)  # pyright: ignore[reportReturnType]
    if exclusive and type(norm) is nn.BatchNorm2d:
        return fusable.over(norm(x))
    return attention(norm(x))


def begin_shortcut(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers(x)`; in inference, if they end in a convolution and its norm, a `Pending` for the add."""
    if torch.is_grad_enabled() or type(layers) is not nn.Sequential or type(x) is not Tensor:
        return layers(x)
    if (
        torch.jit.is_tracing()
    ):  # the graph names the modules that were called; a check retraces without gradients
        return layers(x)
    *before, norm = layers._modules.values() or [None]
    last = before[-1] if before else None
    # The output of a convolution is new memory: nothing else writes to it while the norm is deferred.
    if getattr(type(last), "forward", None) is not nn.Conv2d.forward or watched(layers, last):
        return layers(x)
    if type(norm) is not nn.BatchNorm2d or by_batch(norm) or _has_function_mode():
        return layers(x)
    for layer in before:
        x = layer(x)  # pyright: ignore[reportOptionalCall]
    if type(x) is not Tensor or x.dim() != 4 or not ops.fused(x) or _norm_obstacle(norm, x):
        return norm(x)
    return Pending(norm, None, x)  # pyright: ignore[reportReturnType]


def _has_function_mode() -> bool:
    """Whether a torch function mode is active, other than that of torch's default device."""
    count = 0 if torch.compiler.is_compiling() else torch._C._len_torch_function_stack()
    return count > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count)
    )


def unseen(block: nn.Module) -> bool:
    """Whether no backward follows, and no hook, tracer or mode can see the values between the children."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or transformed()
        or watched(*block._modules.values())
    )


class Pending:
    """A deferred `attention(norm(x))`, later with a shortcut added; or a shortcut's deferred `norm(x)`.

    A ReLU computes all of it as one operation. Any other use computes what is deferred so far, once, and
    continues with that tensor. Gradients are recorded if they were enabled when this was created.
    """

    __slots__ = ("_attention", "_grad", "_norm", "_shortcut", "_unseen", "_value", "_x")

    def __init__(
        self, norm: Any, attention: Any, x: Tensor, shortcut: "Tensor | Pending | None" = None,
        *, unseen: bool = False,
    ) -> None:  # fmt: skip
        self._norm, self._attention, self._shortcut = norm, attention, shortcut
        self._x: Any = x  # None once the ReLU has been computed from it
        self._value: Tensor | None = None
        self._grad = torch.is_grad_enabled()
        self._unseen = unseen  # nothing reads this after the ReLU

    def tensor(self) -> Tensor:
        """The tensor that this represents."""
        if self._value is None:
            with torch.set_grad_enabled(self._grad):
                self._value = self._run(relu=False)
        return self._value

    def _run(self, relu: bool) -> Tensor:
        if self._attention is None:
            return self._norm(self._x)
        if self._x is None:  # it may be overwritten by the result, and its statistics are tracked
            raise RuntimeError(
                "a value before the last ReLU of a residual block was read after that ReLU, with which it is "
                'fused; to read both, compute inside `with cbam.ops.using("reference")`'
            )
        overwrite = relu and self._unseen and self._is_sole_owner()
        x = self._x
        if relu:
            self._x = None
        self._attention.check(x)
        channel, spatial = self._attention.operands(x)
        options = {"norm": normalising(self._norm), "channel": channel, "spatial": spatial, "relu": relu}
        shortcut = self._shortcut
        if isinstance(shortcut, Pending):
            options["shortcut_norm"], shortcut = normalising(shortcut._norm), shortcut._x
        return ops.tail(x, shortcut, **options, overwrite=overwrite)

    def _is_sole_owner(self) -> bool:
        """Whether nothing else holds x or its memory: Python, torch, a view, a library or another process."""
        if self._reference_counts() != _SOLE_OWNER:
            return False
        memory = self._x.untyped_storage()
        return memory.resizable() and not memory.is_shared()

    def _reference_counts(self) -> tuple[int, ...]:
        x, memory = self._x, self._x.untyped_storage()
        in_torch = x._use_count(), torch._C._storage_Use_Count(memory._cdata)
        return sys.getrefcount(x), sys.getrefcount(memory), *in_torch

    def relu(self) -> Tensor:
        """The ReLU of the tensor that this represents."""
        if self._is_deferred() and self._attention is not None:
            return self._run(relu=True)
        return torch.relu(self.tensor())

    def plus(self, other: Any) -> "Pending | Tensor":
        """The sum with a shortcut, still deferred if possible."""
        if self._attention is None and isinstance(other, Pending) and other._attention is not None:
            return other.plus(self)
        joins = isinstance(other, Pending) and other._attention is None and other._is_deferred()
        x, added = self._x, other._x if joins else _tensor(other)
        if (
            self._attention is not None
            and x is not None
            and self._is_deferred()
            and self._shortcut is None
            and type(added) is Tensor
            and (added.shape, added.dtype, added.device) == (x.shape, x.dtype, x.device)
        ):
            return Pending(self._norm, self._attention, x, other if joins else added, unseen=self._unseen)
        return self.tensor() + _tensor(other)

    def _is_deferred(self) -> bool:
        return self._value is None and torch.is_grad_enabled() == self._grad

    __add__ = __radd__ = __iadd__ = plus

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _RELUS and args and isinstance(args[0], cls):
            return args[0].relu()
        if func in _ADDS and len(args) == 2 and not kwargs:
            if isinstance(args[0], cls):
                return args[0].plus(args[1])
            if func not in _ADDS_IN_PLACE:  # else the sum must appear in the tensor itself
                return args[1].plus(args[0])
        return func(*tree_map(_tensor, args), **tree_map(_tensor, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


_SOLE_OWNER = Pending(None, None, torch.empty(0))._reference_counts()


def _on_tensor(name: str) -> Any:
    def operator(self: Pending, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_tensor, args))

    return operator


_OPERATORS = """mul rmul truediv rtruediv floordiv mod sub rsub pow rpow matmul rmatmul neg abs
    lt le gt ge eq ne getitem setitem len iter bool float""".split()
for _name in _OPERATORS:
    setattr(Pending, f"__{_name}__", _on_tensor(f"__{_name}__"))  # Python looks these up on the class only


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Pending) else value


def settled(out: Any) -> Any:
    """The result of a forward, with every deferred value computed."""
    return tree_map(_tensor, out) if isinstance(out, tuple | list | dict) else _tensor(out)


def normalising(norm: nn.BatchNorm2d) -> Norm:
    """The operands of `norm` for the kernels; increments `num_batches_tracked` as its forward does."""
    momentum = norm.momentum
    weight, bias, mean, var, counted = parts(norm, *OF_NORM, "num_batches_tracked")
    if norm.training and norm.track_running_stats and counted is not None:
        counted.add_(1)
        momentum = 1 / float(counted) if momentum is None else momentum
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return Norm(weight, bias, mean, var, by_batch(norm), momentum or 0.0, norm.eps)


def by_batch(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether `norm` normalises with the statistics of the batch."""
    return norm.training or parts(norm, "running_mean")[0] is None


def _norm_obstacle(norm: nn.Module, x: Tensor) -> bool:
    if type(norm) is not nn.BatchNorm2d or F.batch_norm is not _FUNCTION:
        return True
    if type(norm).forward is not _FORWARD or watched(norm):
        return True
    terms, C, dtype = parts(norm, *OF_NORM), x.shape[1], x.dtype
    weight, _, mean, var = terms
    # What torch rejects is left to the norm's own forward: one value per channel, wrong lengths or dtypes.
    if weight is None or (mean is None) != (var is None):
        return True
    if (norm.training or mean is None) and x.numel() == C:
        return True
    narrow = torch.float32 if dtype in _HALVES else dtype
    for t in terms:
        if t is not None and (t.numel() != C or (t.dtype != narrow and t.dtype != dtype)):
            return True
    return not plain(*terms)


OF_NORM = ("weight", "bias", "running_mean", "running_var")


def parts(module: nn.Module, *names: str) -> list[Any]:
    """Parameters, buffers and submodules of a module, four times as fast as `getattr`."""
    if torch.compiler.is_dynamo_compiling():  # it makes its guards from attribute reads
        return [getattr(module, name) for name in names]
    own, found = module.__dict__, []
    parameters, buffers, modules = own["_parameters"], own["_buffers"], own["_modules"]
    for name in names:
        if name in parameters:
            found.append(parameters[name])
        elif name in buffers:
            found.append(buffers[name])
        else:
            found.append(modules[name] if name in modules else getattr(module, name))
    return found


def plain(*tensors: Tensor | None) -> bool:
    """Whether none is a tensor subclass, as the weights of quantised and sharded layers are."""
    for t in tensors:  # noqa: SIM110  (a generator takes four times as long)
        if t is not None and type(t) is not Tensor and type(t) is not nn.Parameter:
            return False
    return True


def watched(*modules: nn.Module | None) -> bool:
    """Whether any module has hooks or a forward set on the instance, which only a call of the module runs."""
    if nn.modules.module._has_any_global_hook():
        return True
    for module in modules:
        if module is None:
            continue
        own = module.__dict__  # a module's own attribute access is slow
        if "forward" in own:
            return True
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
    return False
