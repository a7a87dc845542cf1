"""How long a training step and an inference take, arm beside arm on the same machine."""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.train import Recipe
from cbam.train.optimizer import make_optimizer

WARM_UP = 2
ROUNDS = 15
SECONDS = 20.0


def interleaved(
    arms: dict[str, nn.Module],
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    device: torch.device,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of training steps and inferences of every arm, measured in turns: plain, arm, plain, arm, ...

    Copies are trained, the models stay as they are. Up to ROUNDS rounds follow WARM_UP unmeasured ones;
    from the fifth on they end after SECONDS.

    Args:
        images: normalised float (N, 3, H, W). targets: (N,).

    Returns:
        {arm: {"train": [...], "inference": [...]}} with one number per round.
    """
    images, targets = images.to(device), targets.to(device)
    steps = {
        name: _steps(copy.deepcopy(arm).to(device), images, targets, recipe) for name, arm in arms.items()
    }
    measured = {name: {"train": [], "inference": []} for name in arms}
    began = time.perf_counter()
    for turn in range(WARM_UP + ROUNDS):
        if turn >= WARM_UP + 5 and time.perf_counter() - began > SECONDS:
            break
        for kind in ("train", "inference"):
            for name in arms:
                seconds = _timed(steps[name][kind], device)
                if turn >= WARM_UP:
                    measured[name][kind].append(seconds)
    return measured


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


def _timed(step: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
