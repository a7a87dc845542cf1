"""Trains tiny networks in several forked processes, and prints as JSON how that ended, a line per scenario.

Started by test_peers.py as a program of its own: torch is imported once, with one thread, and each process is
a fork that meets the others at a file. Each line of the standard input names a scenario and its arguments.
"""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from kills import answers, digest
from torch import nn

from cbam import CBAM
from cbam.data import Images
from cbam.errors import CBAMError, DataError
from cbam.train import Recipe, checkpoint, evaluate, fit
from cbam.train.distributed import joined, world
from cbam.train.engine import _devices
from cbam.train.keeper import Keeper
from cbam.train.launch import Place

PLAIN = Recipe(epochs=2, batch_size=8, lr=0.05, precision="fp64")


class Numbered(Images):
    """Images that are a function of index and epoch; one of them may be unreadable or hang."""

    def __init__(self, n: int, *, broken: int = -1, slow: int = -1) -> None:
        super().__init__("numbered", list("abcdef"), [i % 6 for i in range(n)], size=12)
        self.broken, self.slow = broken, slow

    def sample(self, epoch, index):
        if index == self.broken:
            raise DataError(f"{index}.jpg: not an image")
        if index == self.slow:
            os.kill(os.getpid(), signal.SIGSTOP)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.randint(40, (3, 12, 12), generator=generator, dtype=torch.uint8)
        image[index % 3, : 2 + index % 6] += 200 - 30 * (index % 6)
        return image, (float("nan"),) * 4


def plain() -> nn.Module:
    """Without BatchNorm and dropout: nothing in it depends on how a batch is shared."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)
    )


def rich() -> nn.Module:
    """With everything that is saved: running statistics, dropout, attention; and a frozen parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), CBAM(8), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    return model


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(432, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x.flatten(1))


class Poisoned(nn.Sequential):
    """Its output is NaN in one training pass of one process."""

    def __init__(self, rank: int, passes: set[int]) -> None:
        super().__init__(*rich())
        self.rank, self.bad, self.passes = rank, passes, 0

    def forward(self, input):
        self.passes += self.training
        logits = super().forward(input)
        poisoned = self.training and world().rank == self.rank and self.passes in self.bad
        return logits * float("nan") if poisoned else logits


def train(folder: Path | None, model: nn.Module, images: Images, recipe: Recipe, **how) -> list[dict]:
    """Validates on 17 images, so that one of two processes has a batch more than the other."""
    keeper = None
    if folder is not None:
        found = world().from_first(lambda: checkpoint.newest(folder, print))
        state = found[1] if found else None
        keeper = Keeper(folder, {}, state=state, save_every=2, log_every=1, copies=2, say=lambda _: None)
    return fit(model, images, Numbered(17), recipe, seed=1, device="cpu", keeper=keeper, **how)


def ranks(
    size: int, body, *, faults: dict[int, str] | None = None, timeout: float = 60, during=None,
    cuda: bool = False,
) -> list:  # fmt: skip
    """What `body(world)` returned in each process, or how the process ended; and the seconds it all took."""
    with tempfile.TemporaryDirectory() as scratch:
        pids, began = [], time.monotonic()
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                os.environ["CBAM_FAULT"] = (faults or {}).get(rank, "")
                place = Place(rank, size, rank, size, f"file:{scratch}/store")
                _process(Path(scratch), place, body, timeout, cuda)
            pids.append(pid)
        ends = during(pids) if during else [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        seconds = time.monotonic() - began
        said = [Path(scratch, f"{r}.json") for r in range(size)]
        told = [json.loads(path.read_text()) if path.exists() else {} for path in said]
        return [{"code": c, "seconds": seconds, **t} for c, t in zip(ends, told, strict=True)]


def _process(scratch: Path, place: Place, body, timeout: float, cuda: bool) -> None:
    code, told = 0, {}
    try:
        with joined(place, cuda=cuda, timeout=timeout) as here:
            told = {"value": body(here)}
    except BaseException as error:
        code = error.exit_code if isinstance(error, CBAMError) else 1
        told = {"error": f"{type(error).__name__}: {error}", "silent": getattr(error, "silent", None)}
    (scratch / f"{place.rank}.json").write_text(json.dumps(told))
    os._exit(code)


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def equal(size: int, accumulate: int, pictures: int) -> list:
    """Weights, metrics, scores and the reported work after training in fp64."""

    def body(here):
        model, recipe = plain(), dataclasses.replace(PLAIN, accumulate=accumulate)
        work: list[int] = []
        history = train(None, model, Numbered(pictures), recipe, on_step=work.append)
        weights = flat(model)
        scored = evaluate(model.float(), Numbered(11), batch_size=3, device="cpu")
        keys = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5")
        return [weights, [entry[key] for entry in history for key in keys], scored.targets.tolist(),
                [scored.loss, scored.top1, scored.probabilities.sum().item()], sum(work)]  # fmt: skip

    return ranks(size, body)


def killed(size: int, faults: list[str], precision: str = "fp32") -> dict:
    """A run of `size` processes in which one process after the other is killed and all are restarted."""
    recipe = Recipe(epochs=2, batch_size=8, lr=0.1, ema=0.9, precision=precision)
    with tempfile.TemporaryDirectory() as name:
        ends = []
        for number, fault in enumerate([*faults, ""]):
            which = fault.split("@")[1] if "@" in fault else number % size
            ends.append(
                ranks(
                    size, lambda here: len(train(Path(name), rich(), Numbered(20), recipe)) and None,
                    faults={int(which): fault.split("@")[0]},
                )
            )  # fmt: skip
        return {"ends": ends, "digest": digest(Path(name))}


def changed(first: int, then: int) -> dict:
    """A run in fp64 that is resumed with another number of processes."""
    with tempfile.TemporaryDirectory() as name:
        models = []
        for size, fault in ((first, "post_step:4"), (then, "")):

            def body(here):
                model = plain()
                train(Path(name), model, Numbered(20), PLAIN)
                return flat(model)

            models = ranks(size, body, faults=dict.fromkeys(range(size), fault))
        return {"weights": models[0]["value"]}


def nan(nonfinite: str, passes: list[int]) -> list:
    """A loss of NaN in process 1 only."""
    with tempfile.TemporaryDirectory() as name:

        def body(here):
            recipe = Recipe(epochs=1, batch_size=8, nonfinite=nonfinite)
            model = Poisoned(1, set(passes))
            try:
                train(Path(name), model, Numbered(20), recipe)
            finally:
                here.sum(0)
            return flat(model)

        ends = ranks(2, body)
        found = checkpoint.newest(Path(name), print)
        left = Path(name, "nonfinite.json")
        ends[0]["step"] = found[1]["step"] if found else None
        ends[0]["pictures"] = json.loads(left.read_text())["pictures"] if left.exists() else None
        return ends


def broken() -> list:
    """An image that process 1 cannot read."""
    order = fit_order()
    return ranks(2, lambda here: train(None, rich(), Numbered(20, broken=order[6]), Recipe(2, 8)) and None)


def fit_order() -> list[int]:
    from cbam.data import EpochSampler

    return [index for _, index in EpochSampler(20, shuffle=True, seed=1)]


def hung() -> list:
    """Process 1 stops without ending."""
    order = fit_order()

    def during(pids: list[int]) -> list[int]:
        first = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
        os.kill(pids[1], signal.SIGKILL)
        return [first, os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1])]

    return ranks(
        2, lambda here: train(None, rich(), Numbered(20, slow=order[6]), Recipe(2, 8)) and None, timeout=2,
        during=during,
    )  # fmt: skip


def told_to_stop(rank: int) -> list:
    """SIGTERM to one of two processes, on a slow disk; what is saved when each of them exits."""
    save = checkpoint.save

    def slow(*arguments):
        time.sleep(1)
        return save(*arguments)

    with tempfile.TemporaryDirectory() as name:

        def body(here):
            def stop(work):
                if here.rank == rank:
                    os.kill(os.getpid(), signal.SIGTERM)

            try:
                with mock.patch.object(checkpoint, "save", slow):
                    train(Path(name), rich(), Numbered(20), Recipe(epochs=2, batch_size=8), on_step=stop)
            finally:
                Path(name, f"left-{here.rank}").write_text(str(len(checkpoint.checkpoints(Path(name)))))

        ends = ranks(2, body)
        for number, end in enumerate(ends):
            end["saved"] = int(Path(name, f"left-{number}").read_text())
        found = checkpoint.newest(Path(name), print)
        ends[0]["step"] = found[1]["step"] if found else None
        return ends


def unused() -> list:
    """A network with a layer that has no part in the loss."""
    return ranks(2, lambda here: train(None, Half(), Numbered(20), Recipe(epochs=1, batch_size=8)) and None)


def gpus(seen: list[list[str]]) -> list:
    """The GPU that each process takes and passes to Lightning, of those that it sees."""
    taken, began = [0], dist.init_process_group
    stand_in = {
        "device_count": lambda: len(seen[world().rank]),
        "set_device": lambda number: taken.append(number),
        "current_device": lambda: taken[-1],
        "get_device_properties": lambda number: SimpleNamespace(uuid=seen[world().rank][number]),
    }
    with (
        mock.patch.multiple(torch.cuda, **stand_in),
        mock.patch.object(dist, "init_process_group", lambda _, **how: began("gloo", **how)),
    ):
        return ranks(len(seen), lambda here: _devices(torch.device("cuda"), PLAIN)["devices"], cuda=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    told = answers()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), file=told, flush=True)


if __name__ == "__main__":
    main()
