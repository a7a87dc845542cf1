"""BatchNorm that stays as it was trained: what detectors are fine-tuned with, whose batches are small."""

from typing import TypeVar

from torch import nn

from cbam.errors import MissingExtraError
from cbam.surgery import attached

M = TypeVar("M", bound=nn.Module)


def freeze_norm(model: M) -> M:
    """Replace every BatchNorm of a network by torchvision's FrozenBatchNorm2d, in place; returns the network.

    Statistics and affine parameters become buffers under their old names, and no longer learn. Checkpoints go
    in as before, of either kind. Attached attention keeps its own BatchNorm, whose weights it has to learn.

    Args:
        model: a network, before or after `cbam.attach`, or a detector.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    try:
        from torchvision.ops import FrozenBatchNorm2d
    except ImportError as error:
        raise MissingExtraError.of("a frozen BatchNorm", "vision") from error
    learning = {module for part in attached(model).values() for module in part.modules()}
    frozen: dict[nn.Module, nn.Module] = {}  # one that stands in two places stays one
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d) and norm not in learning:
                if norm not in frozen:
                    frozen[norm] = _frozen(norm, FrozenBatchNorm2d)
                setattr(parent, name, frozen[norm])
    return model


def _frozen(norm: nn.BatchNorm2d, kind: type) -> nn.Module:
    """Exactly what `norm` computes in eval mode; without statistics of its own there is nothing to freeze."""
    if norm.running_mean is None or norm.running_var is None:
        return norm
    like = norm.running_mean
    made = kind(norm.num_features, eps=norm.eps).to(like.device, like.dtype).train(norm.training)
    made.running_mean.copy_(norm.running_mean)
    made.running_var.copy_(norm.running_var)
    for name, value in (("weight", norm.weight), ("bias", norm.bias)):
        if value is not None:
            getattr(made, name).copy_(value.detach())
    return made
