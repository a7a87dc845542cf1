"""Classification: uint8 images of one class each, normalised on the device; cross-entropy and errors.

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
    """Cross-entropy, and top-1 and top-5 errors in %, of a classifier: a `Task`.

    Args:
        mean, std: of the data set, per channel, of values / 255.
        recipe: says whether images are mixed and targets smoothed; None where nothing is trained: an
            evaluation keeps the logits of every image, which a validation of many classes has no room for.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], recipe: Recipe | None = None
    ) -> None:
        self.model, self.recipe, self._keeps = model, recipe or Recipe(), recipe is None
        self.mean, self.std = tuple(mean), tuple(std)

    def loss(self, network: Callable[..., Tensor], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The cross-entropy, and how many of the images that count are taken for another class."""
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
        """What is `judged` (N, 2 or 3), indices (N,); where they are kept, targets (N,) and logits (N, K)."""
        logits = self.model(normalise(batch["image"], self.mean, self.std)).float().cpu()
        targets, indices = batch["target"].cpu(), batch["index"].cpu()
        return judged(logits, targets), indices, *((targets, logits) if self._keeps else ())

    def collected(self, outputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The same of all images, by index."""
        parts = [world().joined(torch.cat(part)) for part in zip(*outputs, strict=True)]
        order = parts[1].argsort()
        return tuple(part[order] for part in parts)

    def scores(self, collected: tuple[Tensor, ...]) -> dict[str, float | None]:
        """Loss and errors.

        Raises:
            NonFiniteError: the network gives NaN; its largest class would be no answer of the network's.
        """
        values, indices, *_ = collected
        if bad := indices[values[:, 0].isnan()].tolist():
            told = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise NonFiniteError(
                f"the network gives NaN or infinity for {len(bad)} of {len(indices)} validation images "
                f"({told}); they were not scored"
            )
        # Rounded once: the same whatever the number of threads.
        loss, top1, *top5 = (math.fsum(column) / len(values) for column in values.T.tolist())
        return {"val_loss": loss, "val_top1": 100 * top1, "val_top5": 100 * top5[0] if top5 else None}


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) -> float of zero mean and unit variance, in channels_last: faster in convolutions.

    `mean` and `std` are the data set's, of values / 255.
    """
    kind = torch.get_default_dtype()  # float64 in a training of that precision
    shift, scale = _per_channel(tuple(mean), kind, image.device), _per_channel(tuple(std), kind, image.device)
    return ((image.to(kind) - shift) / scale).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(16)
def _per_channel(values: tuple[float, ...], kind: torch.dtype, device: torch.device) -> Tensor:
    """255 times these as (3, 1, 1). A GPU would be waited for, were they sent there in every step."""
    with torch.inference_mode(False):  # it may be wanted first by an evaluation
        return torch.tensor([255 * value for value in values], dtype=kind, device=device).view(3, 1, 1)


def judged(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 (N, 2 or 3): of each image the cross-entropy, NaN where an output is not finite; whether its
    class is not the first; and, of more than five classes, whether it is not among the first five.
    """
    loss = F.cross_entropy(logits.double(), targets, reduction="none")
    columns = [loss.where(logits.isfinite().all(1), torch.nan), logits.argmax(1) != targets]
    if logits.shape[1] > 5:
        columns.append((logits.topk(5, dim=1).indices != targets[:, None]).all(1))
    return torch.stack([column.double() for column in columns], dim=1)
