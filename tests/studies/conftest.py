"""Results to render without training: invented numbers in the form of results.json."""

import copy

import pytest


def _run(arm: str, seed: int, top1: float, inside: float) -> dict:
    identity = None if arm == "plain" else {"pictures": 32, "bit_equal": True, "largest_difference": 0.0}
    history = [{"epoch": e, "val_top1": top1 + 2 - e} for e in (1, 2)]
    return {
        "arm": arm, "seed": seed, "top1": top1, "top5": top1 / 4, "loss": 0.5, "energy_inside": inside,
        "identity": identity, "history": history,
    }  # fmt: skip


_RESULTS = {
    "schema": 1,
    "status": "complete",
    "created": "2026-01-01T00:00:00+00:00",
    "config": {"model": "resnet_tiny", "attention": ["se", "cbam"], "seeds": 3, "from_scratch": False},
    "protocol": "plain for 1 epochs, then forked",
    "recipes": {
        "arms": {"epochs": 1, "batch_size": 32, "optimizer": "sgd", "lr": 0.05, "schedule": "cosine",
                 "momentum": 0.9, "weight_decay": 1e-4}
    },
    "versions": {"cbam": "0", "torch": "2"},
    "commit": None,
    "device": {"type": "cpu", "name": "a <processor>", "threads": 2},
    "data": {"name": "cats|dogs <b>", "train": 10, "val": 8, "size": 64, "classes": list("abcdefg"),
             "has_boxes": True, "mean": [0.5] * 3, "std": [0.2] * 3, "notes": ["3 hidden files left out"]},
    "arms": [
        {"name": "plain", "parameters": 1000, "gmac": 0.5, "sites": 0},
        {"name": "se", "parameters": 1100, "gmac": 0.5, "sites": 3},
        {"name": "cbam", "parameters": 1200, "gmac": 0.6, "sites": 3},
    ],
    "timing": {
        "plain": {"train": [1.0, 1.0, 1.1, 0.9, 1.0], "inference": [0.5, 0.5, 0.5, 0.5, 0.5]},
        "se": {"train": [1.2, 1.3, 1.3, 1.1, 1.2], "inference": [0.5, 0.6, 0.5, 0.5, 0.6]},
        "cbam": {"train": [2.0, 2.1, 1.9, 2.0, 2.2], "inference": [1.0, 1.0, 1.0, 1.0, 1.0]},
    },
    "starts": [{"seed": 0, "history": [{"epoch": 0, "val_top1": 30.0}]}],
    "runs": [
        *(_run("plain", s, t, i) for s, t, i in ((0, 10.0, 40.0), (1, 12.0, 41.0), (2, 11.0, 42.0))),
        *(_run("se", s, t, i) for s, t, i in ((0, 10.5, 40.1), (1, 11.5, 40.9), (2, 11.2, 42.0))),
        *(_run("cbam", s, t, i) for s, t, i in ((0, 8.0, 39.0), (1, 10.1, 40.1), (2, 8.9, 40.9))),
    ],
    "picture": {"arm": "cbam", "seed": 0, "rows": 5, "indices": [0, 1, 2, 3, 4]},
    "seconds": 90.0,
    "memory_gib": 1.5,
}  # fmt: skip


@pytest.fixture
def results() -> dict:
    return copy.deepcopy(_RESULTS)
