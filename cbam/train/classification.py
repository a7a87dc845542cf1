"""Classification: uint8 pictures of one class each, normalised on the device; cross-entropy and errors.

Shapes: N pictures, K classes. A batch is a dict: "image" uint8 (N, 3, H, W), "target" (N,), "index" (N,).
"""

import functools
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
        recipe: says whether pictures are mixed and targets smoothed.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], recipe: Recipe | None = None
    ) -> None:
        self.model, self.recipe = model, recipe or Recipe()
        self.mean, self.std = tuple(mean), tuple(std)

    def loss(self, network: Callable[..., Tensor], batch: dict, part: Part) -> tuple[Tensor, Tensor]:
        """The cross-entropy, and how many of the pictures that count are taken for another class."""
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

    def output(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), targets (N,), indices (N,)."""
        logits = self.model(normalise(batch["image"], self.mean, self.std))
        return logits.float().cpu(), batch["target"].cpu(), batch["index"].cpu()

    def collected(self, outputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all pictures, by index."""
        parts = (torch.cat(part) for part in zip(*outputs, strict=True))
        logits, targets, indices = (world().joined(part) for part in parts)
        order = indices.argsort()
        return logits[order], targets[order], indices[order]

    def scores(self, collected: tuple[Tensor, Tensor, Tensor]) -> dict[str, float | None]:
        """Loss and errors.

        Raises:
            NonFiniteError: the network gives NaN; its largest class would be no answer of the network's.
        """
        logits, targets, indices = collected
        if bad := indices[~logits.isfinite().all(1)].tolist():
            told = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise NonFiniteError(
                f"the network gives NaN or infinity for {len(bad)} of {len(indices)} validation pictures "
                f"({told}); they were not scored"
            )
        loss, top1, top5 = scores(logits, targets)
        return {"val_loss": loss, "val_top1": top1, "val_top5": top5}


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


def scores(logits: Tensor, targets: Tensor) -> tuple[float, float, float | None]:
    """Mean cross-entropy, top-1 error and top-5 error in %; top-5 is None with five classes or fewer."""
    loss = F.cross_entropy(logits.double(), targets).item()
    top1 = 100 * (logits.argmax(1) != targets).double().mean().item()
    if logits.shape[1] <= 5:
        return loss, top1, None
    best = logits.topk(5, dim=1).indices
    top5 = 100 * (best != targets[:, None]).all(1).double().mean().item()
    return loss, top1, top5
