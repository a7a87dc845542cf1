"""Records -> the tables of a study: our numbers next to the paper's, and differences paired by seed.

A study has one table for every set of shared settings. Only records that count are used
(`records.counts`): finished runs of a clean commit.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cbam.errors import DataError
from cbam.studies.records import counts, same_images
from cbam.studies.statistics import paired_difference, pairs_needed, resolution, spread
from cbam.studies.study import (
    SEEDS,
    Arm,
    Measure,
    Study,
    explicit,
    file_safe,
    run_config,
    run_key,
    shared_part,
)

_ROW = ("attention", "start", "forked", "reduction", "where")


@dataclass
class Table:
    """The records of one study and one protocol, by row and seed."""

    study: Study
    shared: dict[str, Any]
    about: dict[str, Any]
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    changed: int = 0

    @property
    def small(self) -> bool:
        """Whether the data set is smaller than the paper's."""
        return self.study.is_small(self.about["train"])

    @property
    def first(self) -> Measure:
        """The measure used in the sentences and in the figure."""
        return self.study.measures[0]

    @property
    def arms(self) -> dict[str, Arm]:
        """The rows of the whole table, and any other row that has runs."""
        whole = self.study.chosen(small=self.small)
        return {name: arm for name, arm in self.study.arms.items() if name in whole or self.runs.get(name)}

    @property
    def filled(self) -> list[str]:
        """The rows of the whole table that have SEEDS seeds or more."""
        whole = self.study.chosen(small=self.small)
        return [name for name in whole if len(self.runs.get(name, {})) >= SEEDS]

    @property
    def partial(self) -> bool:
        """Whether fewer than half of the rows are filled, so that the table does not count as run."""
        return 2 * len(self.filled) < len(self.study.chosen(small=self.small))

    @property
    def usual(self) -> bool:
        """Whether its runs follow the usual protocol for the data set."""
        protocol = self.study.usual(self.shared["data"], self.about["train"], self.about["size"])
        plain = Arm("", network=None if self.study.many_networks else protocol.network)
        common = shared_part(self.study, run_config(protocol, plain, 0)) | {"size": self.shared["size"]}
        return explicit(common) == explicit(self.shared)

    @property
    def name(self) -> str:
        """The stem of its file names; with a digest if settings or name are not the usual ones."""
        data, network = file_safe(self.shared["data"]), self.shared.get("network")
        name = f"{self.study.name}-{data}"
        if self.usual and data == self.shared["data"]:
            return name
        digest = run_key(self.shared)[:6]
        return f"{name}-{digest}" if network is None else f"{name}-{network}-{digest}"

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """The measure after the last epoch, by seed."""
        found = {seed: run["epochs"][-1].get(measure) for seed, run in self.runs.get(arm, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def tables(study: Study, records: Iterable[dict[str, Any]]) -> list[Table]:
    """The tables that these records fill, the one with the most runs first.

    Raises:
        DataError: records with equal settings are of different images.
    """
    found: dict[str, Table] = {}
    for record in records:
        arm = _row(study, record["config"])
        if arm is None:
            continue
        shared = shared_part(study, record["config"])
        table = found.setdefault(run_key(shared), Table(study, shared, record["data"]))
        if not same_images(table.about, record["data"]):
            raise DataError(
                f"study {study.name}: two data sets named {shared['data']} have records here: {arm} seed "
                f"{record['config']['seed']} is of other images than those before it; give each data set its "
                "own folder"
            )
        table.about = record["data"] | table.about  # older records hold less about the same images
        if counts(record):
            table.runs.setdefault(arm, {})[record["config"]["seed"]] = record
        elif record["status"] != "complete" and not record["dirty"]:
            table.failed.append(record)
        else:
            table.changed += 1
    return sorted(found.values(), key=lambda table: -sum(map(len, table.runs.values())))


def _row(study: Study, config: dict[str, Any]) -> str | None:
    """The row that a run belongs to, found by its settings, since a record may come from another study."""
    for name, arm in study.arms.items():
        own = {key: getattr(arm, key) for key in _ROW}
        same = explicit(own) == explicit({key: config.get(key) for key in _ROW})
        if same and arm.network in (None, config["network"]):
            return name
    return None


def levels(table: Table) -> list[dict[str, Any]]:
    """Per row: means and spreads over the seeds, the paper's numbers, the cost."""
    found = []
    for name, arm in table.arms.items():
        row: dict[str, Any] = {"arm": name, "label": arm.label, "paper": arm.paper}
        for measure in table.study.measures:
            values = list(table.values(name, measure.key).values())
            row[measure.key] = (
                {"mean": statistics.fmean(values), "spread": spread(values)} if values else None
            )
        runs = list(table.runs.get(name, {}).values())
        row["n"] = len(runs)
        row["parameters"], row["gmac"] = (runs[0][key] if runs else None for key in ("parameters", "gmac"))
        found.append(row)
    return found


def differences(table: Table, measure: str) -> list[dict[str, Any]]:
    """Every comparison of the study, paired by seed: `paired_difference`, and its statistical power.

    "resolution" is the smallest true difference that this many pairs detect with a probability of POWER,
    "needed" the number of pairs that would detect one of the size found; None without an interval, or above
    MOST_PAIRS.
    """
    index, about = next((i, m) for i, m in enumerate(table.study.measures) if m.key == measure)
    found = []
    for name, arm in table.arms.items():
        for other in arm.against:
            ours, theirs = arm.paper, table.study.arms[other].paper
            ours, theirs = printed(ours, index), printed(theirs, index)
            paper = None if ours is None or theirs is None else round(ours - theirs, 2)
            row = compared(table.values(name, measure), table.values(other, measure), about)
            found.append({"arm": name, "against": other, "paper": paper} | row)
    return found


def compared(own: dict[int, float], base: dict[int, float], measure: Measure) -> dict[str, Any]:
    """`paired_difference` of the values of two rows, over the seeds that they have in common."""
    both = sorted(own.keys() & base.keys())
    row: dict[str, Any] = {"n": len(both)}
    if both:
        pairs = [own[s] for s in both], [base[s] for s in both]
        row |= paired_difference(*pairs, lower_is_better=measure.lower_is_better)
        row["each"] = {s: own[s] - base[s] for s in both}
        row |= _power(row)
    return row


def printed(paper: tuple[float, ...] | None, index: int) -> float | None:
    """The paper's number for the measure at that index."""
    return paper[index] if paper and index < len(paper) else None


def _power(row: dict[str, Any]) -> dict[str, Any]:
    deviation = spread(list(row["each"].values()))
    if row["low"] is None or not deviation:
        return {"resolution": None, "needed": None}
    return {
        "resolution": resolution(deviation, row["n"]),
        "needed": pairs_needed(row["mean"], deviation),
    }


def commits(runs: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The number of runs per commit."""
    found: dict[str, int] = defaultdict(int)
    for run in runs:
        found[run["commit"]] += 1
    return dict(found)
