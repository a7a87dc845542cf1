"""Single-label classification: uint8 images, normalised on the device; cross-entropy and error rates.

Shapes: N images, K classes. A batch is a dict: "image" uint8 (N, 3, H, W), "target" (N,), "index" (N,).
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.errors import NonFiniteError
from cbam.train.distributed import world
from cbam.train.mixing import mix
from cbam.train.recipe import Recipe
from cbam.train.task import Part


class Classification:
    """The `Task` of a classifier: cross-entropy, and top-1 and top-5 errors in %.

    Args:
        mean, std: of the data set, per channel, of values / 255.
        recipe: mixing and label smoothing; None for an evaluation. Only an evaluation keeps the logits of
            every image: with many classes, a validation during training has no memory for them.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], recipe: Recipe | None = None
    ) -> None:
        self.model, self.recipe, self._keeps = model, recipe or Recipe(), recipe is None
        self.mean, self.std = tuple(mean), tuple(std)

    def loss(self, network: Callable[..., Tensor], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The cross-entropy, and how many of the counted images are misclassified."""
        target, smooth = batch["target"], self.recipe.label_smoothing
        mixed = mix(normalise(batch["image"], self.mean, self.std), self.recipe, part.key)
        logits = network(mixed.image)
        whole = part.parts == 1

        def entropy(target: Tensor) -> Tensor:
            kind = "mean" if whole else "none"
            return F.cross_entropy(logits, target, label_smoothing=smooth, reduction=kind)

        loss = entropy(target)
        if mixed.share < 1:
            loss = mixed.share * loss + (1 - mixed.share) * entropy(target.flip(0))
        wrong = (logits[: part.count].argmax(1) != target[: part.count]).sum()
        return loss if whole else loss[: part.count].sum() * (part.parts / part.samples), wrong

    def trained(self, tally: float) -> dict[str, float]:
        """The training error."""
        return {"train_top1": 100 * tally}

    def output(self, batch: dict) -> tuple[Tensor, ...]:
        """The `per_image_scores` and indices (N,); in an evaluation also targets (N,) and logits (N, K)."""
        logits = self.model(normalise(batch["image"], self.mean, self.std)).float().cpu()
        targets, indices = batch["target"].cpu(), batch["index"].cpu()
        return per_image_scores(logits, targets), indices, *((targets, logits) if self._keeps else ())

    def collected(self, outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The same for all images, sorted by index."""
        parts = [world().concatenated(torch.cat(part)) for part in zip(*outputs, strict=True)]
        order = parts[1].argsort()
        return tuple(part[order] for part in parts)

    def scores(self, collected: tuple[Tensor, ...]) -> dict[str, float | None]:
        """Loss and errors.

        Raises:
            NonFiniteError: an output is NaN or infinite, so its argmax means nothing.
        """
        values, indices, *_ = collected
        if bad := indices[values[:, 0].isnan()].tolist():
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise NonFiniteError(
                f"the network gives NaN or infinity for {len(bad)} of {len(indices)} validation images "
                f"({shown}); they were not scored"
            )
        # fsum rounds once, so the result does not depend on the number of threads.
        loss, top1, *top5 = (math.fsum(column) / len(values) for column in values.T.tolist())
        return {"val_loss": loss, "val_top1": 100 * top1, "val_top5": 100 * top5[0] if top5 else None}


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) -> normalised float in channels_last, which is faster in convolutions.

    `mean` and `std` are those of the data set, of values / 255.
    """
    kind = torch.get_default_dtype()  # float64 when training in fp64
    shift, scale = _per_channel(tuple(mean), kind, image.device), _per_channel(tuple(std), kind, image.device)
    return ((image.to(kind) - shift) / scale).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(16)
def _per_channel(values: tuple[float, ...], kind: torch.dtype, device: torch.device) -> Tensor:
    """255 times these as (3, 1, 1). Cached, as copying them to a GPU in every step would synchronise it."""
    with torch.inference_mode(False):  # the cache may be filled by an evaluation
        return torch.tensor([255 * value for value in values], dtype=kind, device=device).view(3, 1, 1)


def per_image_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 (N, 2 or 3), per image: the cross-entropy, NaN if an output is not finite; the top-1 error, 0
    or 1; and, with more than five classes, the top-5 error.
    """
    loss = F.cross_entropy(logits.double(), targets, reduction="none")
    columns = [loss.where(logits.isfinite().all(1), torch.nan), logits.argmax(1) != targets]
    if logits.shape[1] > 5:
        columns.append((logits.topk(5, dim=1).indices != targets[:, None]).all(1))
    return torch.stack([column.double() for column in columns], dim=1)
