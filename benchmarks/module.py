"""Time CBAM against timm's CbamModule: forward, and forward with backward, in both layouts.

    python -m benchmarks.module [--rounds 15] [--device cpu]

The correctness gate runs first: outputs and gradients in float64 against the literal formula. Only then are
the two modules timed, in turn within each round, and reported as the ratio ours / timm with its spread:
machines drift, pairs do not. One row per case goes to benchmarks/results/module-<device>-torch<version>.csv.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbam

SHAPES = ((8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
HERE = Path(__file__).parent
Module = TypeVar("Module", bound=nn.Module)
LINE = "{shape:>16} {layout} {mode:9} {ms:8.2f} ms   ours/timm {ratio:.2f} [{low:.2f}, {high:.2f}]"
Step = Callable[[], None]


def literal(x: Tensor, part: cbam.CBAM) -> Tensor:
    """The released formula by library calls, batch statistics in the spatial norm."""
    mlp = [part.channel.fc2(F.relu(part.channel.fc1(p))) for p in (x.mean((2, 3)), x.flatten(2).max(2)[0])]
    y = x * torch.sigmoid(mlp[0] + mlp[1])[:, :, None, None]
    s = part.spatial.conv(torch.stack((y.max(1)[0], y.mean(1)), 1))
    s = F.batch_norm(s, None, None, part.spatial.bn.weight, part.spatial.bn.bias, training=True)
    return y * torch.sigmoid(s)


def gate(device: str) -> None:
    """Refuse to time what does not compute the formula, forward and backward, to 1e-12 in float64."""
    for shape in ((2, 32, 7, 9), (3, 17, 13, 17), (2, 16, 1, 31)):
        for layout in LAYOUTS.values():
            module = drawn(cbam.CBAM(shape[1], reduction=4)).to(device).double()
            x, grad = torch.randn(2, *shape, dtype=torch.float64, device=device).unbind()
            results = []
            for function in (module, lambda x, m=module: literal(x.contiguous(), m)):
                leaf = x.contiguous(memory_format=layout).clone().requires_grad_()
                out = function(leaf)
                out.backward(grad)
                results.append((out.detach(), leaf.grad))
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def drawn(module: Module) -> Module:
    """`module` with every parameter drawn anew, so that no gate is constant."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def step(module: nn.Module, x: Tensor, backward: bool) -> Step:
    """One timed unit of work."""
    if not backward:

        def run() -> None:
            with torch.no_grad():
                module(x)
    else:
        leaf, grad = x.detach().requires_grad_(), torch.randn_like(x)

        def run() -> None:
            leaf.grad = None
            module(leaf).backward(grad)

    return run


def interleaved(
    a: Callable[[], None], b: Callable[[], None], rounds: int, device: str
) -> list[tuple[float, float]]:
    """Milliseconds of `a` and `b`, once each per round, after two rounds of warming up."""
    pairs = []
    for _ in range(rounds + 2):
        pair = []
        for run in (a, b):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            pair.append((time.perf_counter() - start) * 1e3)
        pairs.append((pair[0], pair[1]))
    return pairs[2:]


def main() -> None:
    """Gate, time, print and write the rows."""
    from timm.layers.cbam import CbamModule

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gate(options.device)

    rows = []
    for shape in SHAPES:
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, device=options.device).contiguous(memory_format=memory_format)
            ours = drawn(cbam.CBAM(shape[1])).to(options.device)
            theirs = drawn(CbamModule(shape[1], mlp_bias=True)).to(options.device)
            for mode in ("inference", "training"):
                for m in (ours, theirs):
                    m.train(mode == "training")
                runs = (step(ours, x, mode == "training"), step(theirs, x, mode == "training"))
                pairs = interleaved(*runs, options.rounds, options.device)
                rows.append(row(shape, layout, mode, pairs, options))
                print(LINE.format(**rows[-1]), flush=True)
    machine = rows[0]["device"].replace(" ", "_")
    path = HERE / "results" / f"module-{machine}-torch{torch.__version__.split('+')[0]}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path.relative_to(HERE.parent)}")


def row(shape, layout: str, mode: str, pairs: list[tuple[float, float]], options) -> dict:
    """One line of the results file."""
    ratios = [a / b for a, b in pairs]
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu-{platform.machine()}"
    return {
        "op": "CBAM",
        "implementation": "reference",
        "shape": "x".join(map(str, shape)),
        "dtype": "float32",
        "layout": layout,
        "mode": mode,
        "ms": round(statistics.median(a for a, _ in pairs), 3),
        "peer": "timm CbamModule",
        "peer_ms": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "rounds": len(pairs),
        "threads": options.threads,
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit that was measured, marked where the tree differs from it."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
