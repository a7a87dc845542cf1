"""Frozen BatchNorm, as used to fine-tune detectors, whose batches are small."""

from typing import Any, TypeVar

from torch import nn

from cbam.errors import InputError, MissingExtraError
from cbam.surgery import attached

M = TypeVar("M", bound=nn.Module)


def freeze_norm(model: M) -> M:
    """Replace every BatchNorm of a network by torchvision's FrozenBatchNorm2d, in place; returns the network.

    Statistics and affine parameters become buffers under their old names, and are no longer trained.
    Checkpoints from before and after freezing load. Attached attention keeps its own BatchNorm, which has to
    be trained. timm's BatchNormAct2d becomes timm's frozen version, with the activation it contains.
    SyncBatchNorm is assumed to normalise images.

    Args:
        model: a network, before or after `cbam.attach`, or a detector.

    Raises:
        InputError: a subclass of BatchNorm2d or SyncBatchNorm other than timm's BatchNormAct2d.
        MissingExtraError: torchvision is not installed.
    """
    attention_modules = {module for part in attached(model).values() for module in part.modules()}
    frozen: dict[nn.Module | None, nn.Module] = {
        norm: _frozen(norm)  # a shared norm stays shared
        for norm in model.modules()
        if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm not in attention_modules
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in frozen:
                setattr(parent, name, frozen[child])
    return model


def _frozen(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Module:
    """A frozen copy that computes what `norm` does in eval mode; `norm` itself if it has no statistics."""
    if norm.running_mean is None or norm.running_var is None:
        return norm
    frozen = _empty_frozen(norm).to(norm.running_mean.device, norm.running_mean.dtype).train(norm.training)
    values = {name: getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias")}
    for name, value in values.items():
        if value is not None:
            getattr(frozen, name).copy_(value.detach())
    return frozen


def _empty_frozen(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Module:
    """A frozen norm of the same kind, width and epsilon."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        try:
            from torchvision.ops import FrozenBatchNorm2d
        except ImportError as error:
            raise MissingExtraError.of("a frozen BatchNorm", "vision") from error
        return FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    activated: Any = norm
    if type(norm).__module__.startswith("timm.") and type(norm).__name__ == "BatchNormAct2d":
        from timm.layers import FrozenBatchNormAct2d

        frozen = FrozenBatchNormAct2d(norm.num_features, eps=norm.eps)
        frozen.drop, frozen.act = activated.drop, activated.act
        return frozen
    kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
    raise InputError(
        f"{kind} cannot be frozen: it is not a plain BatchNorm2d, SyncBatchNorm or timm BatchNormAct2d"
    )
