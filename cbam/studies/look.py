"""Where trained networks look: Grad-CAM energy inside the true box, and the rows of the image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cbam.data import Images, loader
from cbam.explain import Row, compare_rows, energy_inside, gradcam
from cbam.train.classification import normalise

ROWS = 5
GRADCAM_WORK = 4  # forward passes that cost as much as the Grad-CAM of an image


def first_batch(images: Images, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a set: normalised (N, 3, S, S), and targets (N,)."""
    batch = next(iter(loader(images, min(count, len(images)), train=False)))
    return normalise(batch["image"], images.mean, images.std), batch["target"]


def logits_of(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Logits (N, K) in eval mode, computed on `device`; afterwards they and the model are on the CPU."""
    model.to(device).eval()
    with torch.inference_mode():
        logits = model(images.to(device)).cpu()
    model.to("cpu")
    return logits


def mean_energy_inside(
    model: nn.Module,
    images: Images,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    on_step: Callable[[int], None],
) -> float | None:
    """Mean share of Grad-CAM energy for the true class inside the true box, in %; over images with a box."""
    model.to(device)
    shares = []
    for batch in loader(images, batch_size, train=False, workers=workers):
        pixels = normalise(batch["image"], images.mean, images.std).to(device)
        maps = gradcam(model, pixels, batch["target"]).cpu()
        shares.append(energy_inside(maps, batch["box"]))
        on_step(GRADCAM_WORK * len(maps))
    model.to("cpu")
    known = torch.cat(shares)
    known = known[~known.isnan()]
    return 100 * known.mean().item() if len(known) else None


def rows_of_picture(images: Images) -> list[int]:
    """The index of the first image of up to ROWS classes, evenly spaced over the class list."""
    present = sorted(set(images.targets))
    count = min(ROWS, len(present))
    chosen = [present[i * len(present) // count] for i in range(count)]
    return [images.targets.index(target) for target in chosen]


def look(plain: nn.Module, refined: nn.Module, images: Images, indices: list[int]) -> list[Row]:
    """The rows for `cbam.explain.comparison_figure`: both networks on these images."""
    samples = [images[index] for index in indices]
    shown = torch.stack([sample["image"] for sample in samples])
    return compare_rows(
        plain,
        refined,
        normalise(shown, images.mean, images.std),
        shown,
        torch.tensor([sample["target"] for sample in samples]),
        images.classes,
        torch.stack([sample["box"] for sample in samples]),
    )
