"""Draw docs/img/detect.png: `python -m docs.fill_detection`, about ten minutes on one CPU thread.

A detector is trained on generated shapes, a copy with CBAM from the identity start is trained further, and
`cbam look --detect` shows both.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbam.app.cli import main
from cbam.models import detector

PICTURE = Path(__file__).parents[1] / "docs/img/detect.png"
CLASSES = ("circle", "square", "triangle")
SIDE, STEPS, MORE, BATCH = 128, 350, 80, 4
NETWORK = "fasterrcnn:resnet18"


def shapes(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate an image, uint8 (3, SIDE, SIDE), of two to four shapes on noise, with boxes and labels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    pixels = random.normal(random.uniform(80, 170), 25, (SIDE, SIDE, 3))
    boxes: list[list[float]] = []
    labels = []
    for _ in range(random.integers(2, 5)):
        r = random.uniform(10, 24)
        cx, cy = random.uniform(r, SIDE - r, 2)
        if any(abs(cx - (a + c) / 2) < r + (c - a) / 2 and abs(cy - (b + d) / 2) < r + (d - b) / 2
               for a, b, c, d in boxes):  # fmt: skip
            continue
        label = int(random.integers(1, 4))
        u, v = (x - cx) / r, (y - cy) / r
        inside = (u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 1, (v < 1) & (2 * abs(u) < v + 1))[label - 1]
        colour = random.permutation([30, random.uniform(30, 220), 220])
        pixels[inside] = random.normal(colour, 12, (int(inside.sum()), 3))
        boxes.append([cx - r, cy - r, cx + r, cy + r])
        labels.append(label)
    picture = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
    return picture, {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


def train(name: str, steps: int, peak: float, weights: dict[str, Tensor] | None = None) -> torch.nn.Module:
    """Train a detector of shapes, optionally from the weights of the plain one."""
    torch.manual_seed(0)
    model: Any = detector(name, num_classes=len(CLASSES), start="identity").train()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    model.transform.min_size = (SIDE,)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 64
    optimizer = torch.optim.AdamW(model.parameters(), peak, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
    for step in range(steps):
        samples = [shapes(step * BATCH + i) for i in range(BATCH)]
        losses = model([picture / 255 for picture, _ in samples], [target for _, target in samples])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"{name} step {step}: {loss.item():.3f}", flush=True)
    return model.eval()


def draw() -> None:
    """Train both detectors, run `cbam look`, and copy its figure into the docs."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        plain = train(NETWORK, STEPS, 1e-3).state_dict()
        refined = train(f"{NETWORK}+cbam", MORE, 3e-4, plain).state_dict()
        files = [f"plain={folder}/plain.pt", f"cbam={folder}/cbam.pt"]
        for weights, file in zip((plain, refined), files, strict=True):
            torch.save(weights, file.partition("=")[2])
        pictures = [f"{folder}/shapes-{i}.png" for i in (1, 2, 3)]
        for i, path in enumerate(pictures):
            Image.fromarray(shapes(10_000_000 + i)[0].permute(1, 2, 0).numpy()).save(path)
        Path(folder, "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
        arguments = ["--model", NETWORK, "--compare", *files, "--classes", f"{folder}/classes.txt"]
        code = main(
            ["look", "--detect", *pictures, *arguments, "--size", str(SIDE), "--out", f"{folder}/out"]
        )
        if code:
            raise SystemExit(code)
        shutil.copyfile(f"{folder}/out/detect.png", PICTURE)


if __name__ == "__main__":
    draw()
