"""Attach attention to many networks, train a step, detach, and report the results: docs/matrix.md.

    python -m benchmarks.matrix [--only PATTERN] [--fresh]

tests/surgery/architectures.toml lists the networks, and for some the number of places counted by hand. A row
per network is appended to benchmarks/results/matrix.jsonl as soon as it is computed, so that an interrupted
run resumes; rows of other library versions or of other cbam code are computed again. `--fresh` computes all
again, for example after a change of this file.
"""

import argparse
import copy
import datetime
import hashlib
import json
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import cbam
from cbam.errors import AttachError
from cbam.surgery import Site, attached

ROOT = Path(__file__).parents[1]
NETWORKS = ROOT / "tests" / "surgery" / "architectures.toml"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.jsonl"
PAGE = ROOT / "docs" / "matrix.md"
CLASSES, SIZE = 7, 64
ROUTES = {
    "after": "after a child of the block",
    "before": "before one (dropout, drop path)",
    "graph": "by a forward generated from the block's graph",
}


def networks() -> dict[str, int | None]:
    """Every network, "library/name", with the number of sites counted by hand, if known."""
    lists = tomllib.loads(NETWORKS.read_text("utf-8"))
    return lists["expected"] | dict.fromkeys(lists["more"]["names"].split())


def versions() -> dict[str, str]:
    """The versions a row depends on: the libraries, and a digest of the code that attaches."""
    names = [
        f"cbam/surgery/{name}.py"
        for name in ("attach", "effects", "graph", "route", "sites", "tracing", "trial")
    ]
    files = [ROOT / name for name in [*names, "cbam/nn/cbam.py", "cbam/nn/gate.py"]]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return {
        "torch": torch.__version__.partition("+")[0],
        "torchvision": torchvision.__version__.partition("+")[0],
        "timm": timm.__version__,
        "code": code.hexdigest()[:12],
    }


def build(name: str) -> nn.Module:
    """A network with seven classes in eval mode; as in a trained network, no branch is zero."""
    torch.manual_seed(0)
    model = cbam.build(name.replace("/", ":"), num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.0)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


def examine(name: str) -> dict[str, Any]:
    """Compute a row: attach to `name`, train a step, detach."""
    model = build(name)
    x, plain = first_run(model)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    found = cbam.sites(model)
    row: dict[str, Any] = {
        "size": x.shape[-1],
        "routes": dict(Counter(s.route.when for s in found if s.default and s.route)),
        "left_out": left_out(found),
        "sites": sum(s.default for s in found),
    }
    try:
        cbam.attach(model)
    except AttachError as error:
        return row | {"refused": str(error)}
    row["attached"] = len(attached(model))
    row["equal"] = torch.equal(evaluate(model, x), plain)
    row["keys"] = [k for k in model.state_dict() if ".cbam." not in k] == keys
    before = copy.deepcopy(model.state_dict())
    row["without_gradient"] = without_gradient(model, x)
    if row["without_gradient"]:
        row["without_gradient"] = sorted({*row["without_gradient"]} - {*without_gradient(build(name), x)})
    model.load_state_dict(before)
    cbam.detach(model)
    same = list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    row["detached"] = same and torch.equal(evaluate(model, x), plain)
    return row


def first_run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The smallest input that the network accepts, and its output."""
    default = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
    sizes = sorted({SIZE, default})
    for size in sizes:
        torch.manual_seed(1)
        x = torch.randn(2, 3, size, size)
        try:
            out = evaluate(model, x)
        except Exception:  # networks reject unsupported sizes with errors of any type
            if size == sizes[-1]:
                raise
        else:
            return x, out
    raise AssertionError


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    """The logits in eval mode."""
    return model.eval()(x)


def without_gradient(model: nn.Module, x: Tensor) -> list[str]:
    """Train one step; return the parameters that got no gradient."""
    model.train()
    F.cross_entropy(model(x), torch.arange(len(x))).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def left_out(found: list[Site]) -> dict[str, int]:
    """Number of blocks without a site, by reason, without names specific to a block."""
    reasons = Counter(reason(site.why) for site in found if not site.default)
    return dict(reasons.most_common())


def reason(why: str) -> str:
    """The general form of the reason why a block has no site."""
    for start in ("linear branch", "partial residual", "parallel sum", "a cell", "a gate", "a mask"):
        if start in why:
            return start
    for start in ("an attention module", "works on channels-last", "works on tokens", "cannot be traced"):
        if start in why:
            return start
    if why.startswith("cannot be run alone"):
        return "cannot be run alone"
    why = re.sub(r"\b[\w.]+ is called (\d+) times", r"its last child is called \1 times", why)
    why = re.sub(r"\b[\w.]+ is no direct child", "its last layer is no direct child", why)
    return re.sub(r"[\w.]+ uses the name \w+ for something else too", "its child's name is used twice", why)


# --- the page --------------------------------------------------------------------------------------


def page(rows: dict[str, dict[str, Any]], expected: dict[str, int | None]) -> Iterator[str]:
    """docs/matrix.md, line by line."""
    made = next(iter(rows.values()))
    attached_to = {n: r for n, r in rows.items() if r.get("attached")}
    counted = [n for n in rows if expected[n] is not None]
    minutes = sum(r["seconds"] for r in rows.values()) / 60
    yield "# The networks that were tried"
    yield ""
    yield (
        f"{len(rows)} networks of torchvision {made['torchvision']} and timm {made['timm']}, torch "
        f"{made['torch']}, one CPU thread, float32, randomly initialised, {made['date']}. `make matrix` "
        f"(`benchmarks/matrix.py`) computes this page; it took {minutes:.0f} minutes."
    )
    yield ""
    facts = {
        "with attention attached": len(attached_to),
        "output bit-identical after `cbam.attach(model)`": sum(r["equal"] for r in attached_to.values()),
        "with a gradient at every parameter in a training step (where the plain network has one)": sum(
            not r["without_gradient"] for r in attached_to.values()
        ),
        "bit-identical, with plain keys and classes, after that step, plain weights and `cbam.detach`": sum(
            r["detached"] for r in attached_to.values()
        ),
    }
    yield "| networks | |"
    yield "|---|---|"
    for text, count in facts.items():
        yield f"| {text} | {count} |"
    right = sum(rows[n].get("sites") == expected[n] for n in counted)
    yield f"| with as many places as a count by hand of their definition | {right} of {len(counted)} |"
    yield f"| places in all | {sum(r['attached'] for r in attached_to.values())} |"
    yield ""
    yield (
        "*Input* is the side of the two square input images. *Routes* say where in the block attention runs: "
        + "; ".join(f"{when} = {text}" for when, text in ROUTES.items())
        + ". [Attaching](attaching.md#where-it-goes) explains the reasons for places left out. If a network "
        "has no place, `attach` refuses it with the reason, and leaves it unchanged."
    )
    yield ""
    yield "## Attached"
    yield ""
    yield "| network | input | places | counted | routes | bit-identical | gradients | detached | left out |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, row in attached_to.items():
        count = expected[name]
        routes = ", ".join(f"{n} {when}" for when, n in row["routes"].items())
        cells = [
            name,
            row["size"],
            row["attached"],
            "" if count is None else count,
            routes,
            yes(row["equal"]),
            "all" if not row["without_gradient"] else "none at " + ", ".join(row["without_gradient"][:3]),
            yes(row["detached"]),
            listed(row["left_out"]),
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"
    yield ""
    yield "## Not attached, and why"
    yield ""
    yield "| network | input | counted | why |"
    yield "|---|---|---|---|"
    for name, row in rows.items():
        if name not in attached_to:
            count = expected[name]
            why = row.get("failed") or listed(row["left_out"]) or "no residual block with a convolution"
            yield f"| {name} | {row.get('size', '')} | {'' if count is None else count} | {why} |"


def yes(value: bool) -> str:
    return "yes" if value else "**no**"


def listed(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {text}" for text, count in reasons.items())


# --- the run ---------------------------------------------------------------------------------------


def kept(now: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run with the same versions."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return {row["network"]: row for row in rows if all(row[k] == v for k, v in now.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument(
        "--only", default="", help="run only the networks whose name matches; the page is not written"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore the rows of earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the inputs are small, and a second thread mostly waits
    now, expected = versions(), networks()
    rows = {} if options.fresh else kept(now)
    RESULTS.parent.mkdir(exist_ok=True)
    if not options.only:
        RESULTS.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()), encoding="utf-8")
    for name in expected:
        if name in rows or not re.search(options.only, name):
            continue
        begin = time.perf_counter()
        try:
            row = examine(name)
        except Exception as error:  # a failing network is a row, and does not end the run
            row = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        seconds = round(time.perf_counter() - begin, 2)
        row = {"network": name, **now, "date": f"{datetime.date.today()}", "seconds": seconds, **row}
        rows[name] = row
        print(f"{seconds:6.1f} s  {name}  {summary(row)}", flush=True)
        if not options.only:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")
    if not options.only:
        ordered = {name: rows[name] for name in expected}
        PAGE.write_text("\n".join(page(ordered, expected)) + "\n", encoding="utf-8")
    wrong = [n for n, row in rows.items() if not sound(row, expected.get(n))]
    sys.exit(f"not as expected: {', '.join(wrong)}" if wrong else 0)


def summary(row: dict[str, Any]) -> str:
    known = ("network", "seconds", "date", "torch", "torchvision", "timm", "code")
    facts = {k: v for k, v in row.items() if k not in known}
    return json.dumps(facts)


def sound(row: dict[str, Any], count: int | None) -> bool:
    """Whether a row meets the project's guarantees."""
    if "failed" in row or (count is not None and row["sites"] != count):
        return False
    if "refused" in row:
        return row["sites"] == 0
    return row["equal"] and row["keys"] and row["detached"] and not row["without_gradient"]


if __name__ == "__main__":
    main()
