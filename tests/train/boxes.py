"""Trains a small detector in forked processes that are killed, or that share the work; prints JSON.

Started by test_detection.py as a program of its own, with the folder of images as its argument; it works
like kills.py and peers.py. Each line of the standard input names a scenario and its arguments.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from conftest import small_detector
from kills import answers, digest, forked_into
from peers import ranks

from cbam.data import boxed_folder
from cbam.train import Recipe, checkpoint, evaluate_detector, fit
from cbam.train.keeper import Keeper

RECIPE = Recipe(epochs=2, batch_size=4, lr=0.02, ema=0.9)


def train(folder: Path, images) -> None:
    found = checkpoint.newest(folder, print)
    keeper = Keeper(
        folder, {}, state=found[1] if found else None, save_every=2, log_every=1, copies=2, say=lambda _: None
    )
    fit(small_detector(), *images, RECIPE, seed=1, device="cpu", keeper=keeper)


def killed(images, faults: list[str]) -> dict:
    """A run that meets these faults one after the other, and finally runs to its end."""
    with tempfile.TemporaryDirectory() as folder:
        count = sum(forked_into(Path(folder), images, fault, train) for fault in faults)
        assert not forked_into(Path(folder), images, "", train)
        return {"killed": count, "digest": digest(Path(folder))}


def shared(images, size: int) -> list:
    """Scores and detections of a detector evaluated by several processes, and a training run of theirs."""

    def body(here):
        model = small_detector()
        scored = evaluate_detector(model, images[1], batch_size=2, device="cpu")
        boxes = [number for own in scored.found.values() for number in own["boxes"].flatten().tolist()]
        history = fit(model, *images, RECIPE, seed=1, device="cpu")
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        entries = [{k: v for k, v in entry.items() if k.startswith("val_")} for entry in history]
        return {
            "scores": scored.scores, "boxes": boxes, "pictures": list(scored.truth), "history": entries,
            "weights": weights.sum().item(), "finite": bool(weights.isfinite().all()),
        }  # fmt: skip

    return ranks(size, body)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train_set, val = boxed_folder(sys.argv[1])
    images, told = (train_set.augmented("ssd"), val), answers()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        ended = {"killed": killed, "shared": shared}[name](images, *arguments)
        print(json.dumps(ended), file=told, flush=True)


if __name__ == "__main__":
    main()
