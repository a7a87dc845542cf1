"""Train the gates of the default pair: `python tools/train_gates.py PICTURES --out DIR`.

The base, EfficientNet-Lite0 with its ImageNet weights, stays frozen to the last bit, its BatchNorm too; CBAM
starts as the identity, and its gates alone are trained. PICTURES holds train/ and val/ with a folder for each
class, named by its WordNet id; Imagenette (imagenette96) is what the gates of the package were made with.

The loss is the cross-entropy over the classes at hand, which are ten of the thousand, plus the divergence
from the plain network over all thousand: the first asks for better, the second to leave the others alone.

It writes the gates and a record of what was run and what came out, validation pictures plain against CBAM.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

import cbam
from cbam.data import decode
from cbam.explain import pair

SIZES = (128, 160, 192)  # of training, in turn by chance; the pictures have 96 pixels
KEEP = 0.5  # weight of the divergence from the plain network
SCORED = (160, pair.SIZE)


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    began = time.monotonic()
    train = _pictures(options.pictures / "train", options.per_class)
    val = _pictures(options.pictures / "val", options.val_per_class)
    model = cbam.attach(pair.plain_network())
    teacher = pair.plain_network()
    losses = fit(model, teacher, train, options)
    options.out.mkdir(parents=True, exist_ok=True)
    gates, record = options.out / pair.GATES.name, options.out / pair.RECORD.name
    save_file(pair.gates_of(model), gates)
    scores = {str(size): score(teacher, model, val, size) for size in SCORED}
    record.write_text(
        json.dumps(
            {
                "what": "CBAM on EfficientNet-Lite0, base frozen, gates trained from the identity",
                "command": f"python tools/train_gates.py PICTURES --epochs {options.epochs} "
                f"--batch-size {options.batch_size} --lr {options.lr} --seed {options.seed}"
                + (f" --per-class {options.per_class}" if options.per_class else "")
                + (f" --val-per-class {options.val_per_class}" if options.val_per_class else ""),
                "pictures": {"name": options.pictures.name, "train": len(train[1]), "val": len(val[1])},
                "classes": train[2].tolist(),
                "sizes": SIZES,
                "optimizer": "Adam, cosine to 0",
                "loss": f"cross-entropy over the classes + {KEEP} KL from plain over 1000",
                "loss_by_epoch": losses,
                "validation": scores,
                "gates": {
                    "tensors": len(pair.gates_of(model)),
                    "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                    "sha256": _sha256(gates),
                },
                "base": {"file": pair.base_file().name, "sha256": _sha256(pair.base_file())},
                "minutes": round((time.monotonic() - began) / 60, 1),
                "versions": {
                    "cbam": cbam.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"{gates}\n{record}")


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
        "--per-class", type=int, metavar="N", help="the first N training pictures of each class"
    )
    parser.add_argument("--val-per-class", type=int, metavar="N", help="the same of the validation pictures")
    return parser.parse_args()


def _pictures(folder: Path, per_class: int | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """The pictures, uint8 (3, H, W), their ImageNet classes (N,), and the classes that occur (K,)."""
    index = {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    found = [
        (path, index[path.parent.name])
        for sub in sorted(folder.iterdir())
        for path in sorted(sub.iterdir())[:per_class]
    ]
    targets = torch.tensor([target for _, target in found])
    return [decode(path) for path, _ in found], targets, targets.unique()


def batch(pictures: list[Tensor], size: int, generator: torch.Generator | None = None) -> Tensor:
    """Normalised (N, 3, size, size); with a generator cropped (to 70 % at least) and flipped."""
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


def fit(model: nn.Module, teacher: nn.Module, train, options) -> list[float]:
    """Train the gates in place; the mean loss of each epoch."""
    pictures, targets, classes = train
    gates = [p for name, p in model.named_parameters() if ".cbam." in name]
    for p in model.parameters():
        p.requires_grad_(any(p is gate for gate in gates))
    model.eval()
    for name, module in model.named_modules():
        if ".cbam." in name:
            module.train()  # the gate's own BatchNorm alone
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(gates, lr=options.lr)
    steps = options.epochs * math.ceil(len(targets) / options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    local = {int(c): i for i, c in enumerate(classes)}
    losses = []
    for epoch in range(options.epochs):
        total, began = 0.0, time.monotonic()
        for chosen in torch.randperm(len(targets), generator=generator).split(options.batch_size):
            size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
            images = batch([pictures[i] for i in chosen], size, generator)
            with torch.no_grad():
                wanted = teacher(images).softmax(1)
            scores = model(images)
            own = torch.tensor([local[int(t)] for t in targets[chosen]])
            kept = F.kl_div(scores.log_softmax(1), wanted, reduction="batchmean")
            loss = F.cross_entropy(scores[:, classes], own) + KEEP * kept
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        losses.append(round(total / len(targets), 5))
        print(f"epoch {epoch + 1}: loss {losses[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    return losses


def score(plain: nn.Module, refined: nn.Module, val, size: int) -> dict:
    """Both networks on the same pictures, the refined one against the plain one, picture by picture."""
    pictures, targets, classes = val
    rows: dict[str, list[Tensor]] = {"plain": [], "cbam": []}
    with torch.inference_mode():
        for chosen in torch.arange(len(targets)).split(64):
            images = batch([pictures[i] for i in chosen], size)
            rows["plain"].append(plain(images))
            rows["cbam"].append(refined(images))
    logits = {arm: torch.cat(parts) for arm, parts in rows.items()}
    right = {arm: {
        "top1_of_1000": (scores.argmax(1) == targets),
        f"top1_of_{len(classes)}": (classes[scores[:, classes].argmax(1)] == targets),
    } for arm, scores in logits.items()}  # fmt: skip
    out: dict = {"agreement": (logits["plain"].argmax(1) == logits["cbam"].argmax(1)).float().mean().item()}
    for name in right["plain"]:
        a, b = right["plain"][name].double(), right["cbam"][name].double()
        half = 1.96 * float((b - a).std()) / math.sqrt(len(a))
        mean = float((b - a).mean())
        out[name] = {
            "plain": round(100 * float(a.mean()), 3),
            "cbam": round(100 * float(b.mean()), 3),
            "difference": round(100 * mean, 3),
            "low": round(100 * (mean - half), 3),
            "high": round(100 * (mean + half), 3),
        }
    return out


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
