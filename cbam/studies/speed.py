"""Times of a training step and an inference, of all arms on the same machine."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.studies.timing import NETWORK, in_turns
from cbam.train import Recipe
from cbam.train.optimizer import make_optimizer

ROUNDS = 15
SECONDS = 20.0


def interleaved(
    arms: dict[str, nn.Module],
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    device: torch.device,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of training steps and inferences of every arm, measured in alternation: plain, arm, plain, ...

    Copies are trained, the models are unchanged. At most ROUNDS rounds; after SECONDS no further one begins,
    but at least five run.

    Args:
        images: normalised float (N, 3, H, W). targets: (N,).

    Returns:
        {arm: {"train": [...], "inference": [...]}}, one number per round.
    """
    images, targets = images.to(device), targets.to(device)
    programs = {
        name: _steps(copy.deepcopy(arm).to(device), images, targets, recipe) for name, arm in arms.items()
    }
    kinds = ("train", "inference")
    steps = {(name, kind): programs[name][kind] for kind in kinds for name in arms}
    timed = in_turns(steps, device, rounds=ROUNDS, seconds=SECONDS, least=NETWORK)
    return {name: {kind: [ms / 1e3 for ms in timed[name, kind].ms] for kind in kinds} for name in arms}


def _steps(
    model: nn.Module, images: Tensor, targets: Tensor, recipe: Recipe
) -> dict[str, Callable[[], None]]:
    model.to(memory_format=torch.channels_last)  # as in training
    optimizer = make_optimizer(recipe, model.parameters())

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    def inference() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    return {"train": train, "inference": inference}
