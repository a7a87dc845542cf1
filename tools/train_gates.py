"""Train the gates of the default pair: `python tools/train_gates.py PICTURES --out DIR`.

The base, EfficientNet-Lite0 with its ImageNet weights, stays frozen to the last bit, including its BatchNorm;
CBAM starts as the identity, and only its gates are trained. PICTURES holds train/ and val/ with a folder for
each class, named by its WordNet id; the gates in the package were trained on Imagenette (imagenette96).

The loss is the cross-entropy over the classes in PICTURES, ten of the thousand, plus the KL divergence from
the plain network over all thousand: the first improves these classes, the second preserves the others.

The program writes the gates, and a record with the settings and the validation of CBAM against plain.
With `--minutes` it stops in time (exit code 75), and the same command resumes where it stopped.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

import cbam
from cbam.data import decode
from cbam.explain import pair

SIZES = (128, 160, 192)  # training sizes, chosen at random per batch; the images have 96 pixels
KEEP = 0.5  # weight of the divergence from the plain network
SCORED = (160, pair.SIZE)


class OutOfTimeError(Exception):
    """The time limit is reached; progress is saved."""


class Progress:
    """The progress, saved in a file next to the gates, from which a call with the same options resumes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path, self._began = options.out / "unfinished.pt", time.monotonic()
        self._ends = math.inf if options.minutes is None else self._began + 60 * options.minutes
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("out", "minutes")}
        self.state: dict[str, Any] = {"settings": settings, "seconds": 0.0}
        if self._path.exists():
            found = torch.load(self._path, weights_only=True)
            if found["settings"] != settings:
                raise SystemExit(f"{self._path} was written with other options: {found['settings']}")
            self.state = found

    @property
    def minutes(self) -> float:
        """Computing time so far, including earlier calls."""
        return (self.state["seconds"] + time.monotonic() - self._began) / 60

    def check(self, **done: Any) -> None:
        """Save `done` and stop if the time limit is reached."""
        if time.monotonic() >= self._ends:
            self.save(**done)
            raise OutOfTimeError

    def save(self, **done: Any) -> None:
        """Add `done` to the saved state."""
        self.state |= done
        now = time.monotonic()
        self.state["seconds"] += now - self._began
        self._began = now
        part = self._path.with_suffix(".part")
        torch.save(self.state, part)
        part.replace(self._path)

    def end(self) -> None:
        """Delete the saved progress."""
        self._path.unlink(missing_ok=True)


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(options)
    try:
        _work(options, progress)
    except OutOfTimeError:
        print(f"stopped after {progress.minutes:.1f} minutes in all; the same command resumes")
        sys.exit(75)
    progress.end()


def _work(options: argparse.Namespace, progress: Progress) -> None:
    torch.manual_seed(options.seed)
    model, plain = cbam.attach(pair.plain_network()), pair.plain_network()
    train = _pictures(options.pictures / "train", options.per_class)
    losses = fit(model, plain, train, options, progress)
    networks = {"plain": plain, "cbam": model}
    if options.earlier:
        networks["earlier"] = pair.refined_network(options.earlier)
    val = _pictures(options.pictures / "val", options.val_per_class)
    logits = {
        size: {
            name: _logits(network, val, size, f"{name} {size}", progress)
            for name, network in networks.items()
        }
        for size in SCORED
    }
    gates, record = options.out / pair.GATES.name, options.out / pair.RECORD.name
    save_file(pair.gates_of(model), gates)
    result = {
        "what": "CBAM on EfficientNet-Lite0, base frozen, gates trained from the identity",
        "command": _command(options),
        "pictures": {"name": options.pictures.name, "train": len(train[1]), "val": len(val[1])},
        "classes": train[2].tolist(),
        "sizes": SIZES,
        "optimizer": "Adam, cosine to 0",
        "loss": f"cross-entropy over the classes + {KEEP} KL from plain over 1000",
        "loss_by_epoch": losses,
        "validation": {str(size): compare(own["plain"], own["cbam"], val) for size, own in logits.items()},
        "gates": {
            "tensors": len(pair.gates_of(model)),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "sha256": _sha256(gates),
        },
        "base": {"file": pair.base_file().name, "sha256": _sha256(pair.base_file())},
        "minutes": round(progress.minutes, 1),
        "versions": {
            "cbam": cbam.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if options.earlier:
        result["earlier"] = {
            "sha256": _sha256(options.earlier),
            "validation": {
                str(size): compare(own["earlier"], own["cbam"], val, ("earlier", "cbam"))
                for size, own in logits.items()
            },
        }
    record.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{gates}\n{record}")


def _command(options: argparse.Namespace) -> str:
    arguments = (
        f"--epochs {options.epochs} --batch-size {options.batch_size} --lr {options.lr} --seed {options.seed}"
    )
    if options.per_class:
        arguments += f" --per-class {options.per_class}"
    if options.val_per_class:
        arguments += f" --val-per-class {options.val_per_class}"
    return f"python tools/train_gates.py PICTURES {arguments}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, default=pair.GATES.parent)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--per-class", type=int, metavar="N", help="use the first N training images of each class"
    )
    parser.add_argument("--val-per-class", type=int, metavar="N", help="the same for validation images")
    parser.add_argument(
        "--earlier", type=Path, metavar="FILE", help="other gates to score on the same images"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="stop after this time; the same command resumes"
    )
    return parser.parse_args()


def _pictures(folder: Path, per_class: int | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """The images, uint8 (3, H, W), their ImageNet classes (N,), and the classes that occur (K,)."""
    index = {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    found = [
        (path, index[path.parent.name])
        for sub in sorted(folder.iterdir())
        for path in sorted(sub.iterdir())[:per_class]
    ]
    targets = torch.tensor([target for _, target in found])
    return [decode(path) for path, _ in found], targets, targets.unique()


def batch(pictures: list[Tensor], size: int, generator: torch.Generator | None = None) -> Tensor:
    """A normalised batch (N, 3, size, size); with a generator, cropped (to 70 % or more) and flipped."""
    views = []
    for picture in pictures:
        if generator is not None:
            picture = _augmented(picture, generator)
        views.append(pair.view(picture, size, size))
    return (torch.stack(views) / 255 - 0.5) / 0.5


def _augmented(picture: Tensor, generator: torch.Generator) -> Tensor:
    share, top, left, flip = torch.rand(4, generator=generator).tolist()
    side = round(min(picture.shape[1:]) * (0.7 + 0.3 * share))
    y, x = (round(at * (length - side)) for at, length in zip((top, left), picture.shape[1:], strict=True))
    cut = picture[:, y : y + side, x : x + side]
    return cut.flip(2) if flip < 0.5 else cut


def fit(
    model: nn.Module,
    teacher: nn.Module,
    train: tuple[list[Tensor], Tensor, Tensor],
    options: argparse.Namespace,
    progress: Progress,
) -> list[float]:
    """Train the gates in place; return the mean loss of each epoch."""
    targets = train[1]
    gates = _ready(model)
    optimizer = torch.optim.Adam(gates, lr=options.lr)
    steps = options.epochs * math.ceil(len(targets) / options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    order, done, total = torch.empty(0, dtype=torch.long), 0, 0.0
    if "order" in (state := progress.state):
        model.load_state_dict(state["gates"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        losses, order, done, total = state["losses"], state["order"], state["done"], state["total"]
    while len(losses) < options.epochs:
        if done == 0:
            order = torch.randperm(len(targets), generator=generator)
        while done < len(order):
            chosen = order[done : done + options.batch_size]
            loss = _loss(model, teacher, train, chosen, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total, done = total + loss.item() * len(chosen), done + len(chosen)
            progress.check(
                gates=pair.gates_of(model), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                generator=generator.get_state(), losses=losses, order=order, done=done, total=total,
            )  # fmt: skip
        losses.append(round(total / len(targets), 5))
        done, total = 0, 0.0
        print(f"epoch {len(losses)}: loss {losses[-1]}, {progress.minutes:.1f} minutes", flush=True)
    if options.epochs:
        progress.save(gates=pair.gates_of(model), losses=losses, order=order, done=0, total=0.0)
    model.eval()
    return losses


def _ready(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but the gates, including BatchNorm statistics; return the gates' parameters."""
    gates = [p for name, p in model.named_parameters() if ".cbam." in name]
    for p in model.parameters():
        p.requires_grad_(any(p is gate for gate in gates))
    model.eval()
    for name, module in model.named_modules():
        if ".cbam." in name:
            module.train()  # only the gates' own BatchNorm
    return gates


def _loss(model: nn.Module, teacher: nn.Module, train, chosen: Tensor, generator: torch.Generator) -> Tensor:
    pictures, targets, classes = train
    size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
    images = batch([pictures[i] for i in chosen], size, generator)
    with torch.no_grad():
        wanted = teacher(images).softmax(1)
    scores = model(images)
    own = torch.searchsorted(classes, targets[chosen])
    kept = F.kl_div(scores.log_softmax(1), wanted, reduction="batchmean")
    return F.cross_entropy(scores[:, classes], own) + KEEP * kept


def _logits(network: nn.Module, val, size: int, name: str, progress: Progress) -> Tensor:
    """Logits (N, 1000) of the validation images at this size, computed once."""
    pictures, targets, _ = val
    parts: list[Tensor] = progress.state.get(name, [])
    with torch.inference_mode():
        for first in range(64 * len(parts), len(targets), 64):
            parts.append(network(batch(pictures[first : first + 64], size)))
            progress.check(**{name: parts})
    progress.save(**{name: parts})
    return torch.cat(parts)


def compare(base: Tensor, other: Tensor, val, names: tuple[str, str] = ("plain", "cbam")) -> dict:
    """Compare two sets of logits, paired by image."""
    _, targets, classes = val
    right = {
        "top1_of_1000": lambda logits: logits.argmax(1) == targets,
        f"top1_of_{len(classes)}": lambda logits: classes[logits[:, classes].argmax(1)] == targets,
    }
    out: dict = {"agreement": (base.argmax(1) == other.argmax(1)).float().mean().item()}
    for name, of in right.items():
        a, b = of(base).double(), of(other).double()
        half = 1.96 * float((b - a).std()) / math.sqrt(len(a))
        mean = float((b - a).mean())
        out[name] = {
            names[0]: round(100 * float(a.mean()), 3),
            names[1]: round(100 * float(b.mean()), 3),
            "difference": round(100 * mean, 3),
            "low": round(100 * (mean - half), 3),
            "high": round(100 * (mean + half), 3),
        }
    return out


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
