"""Records -> the table of a study: the paper's number beside ours, and differences paired by seed.

A study's records make one table for every set of shared settings. Only records that count are used
(`records.counts`): finished runs of a clean commit.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cbam.errors import DataError
from cbam.studies.records import counts, same_pictures
from cbam.studies.statistics import paired_difference, pairs_needed, resolution, spread
from cbam.studies.study import (
    SEEDS,
    Arm,
    Measure,
    Study,
    in_files,
    run_config,
    run_key,
    said,
    shared_part,
)

_ROW = ("attention", "start", "forked", "reduction", "where")


@dataclass
class Table:
    """The records of one study by one protocol, by row and seed."""

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
        """The measure that the sentences and the figure are about."""
        return self.study.measures[0]

    @property
    def arms(self) -> dict[str, Arm]:
        """The rows that make the whole table, and any other that has runs."""
        whole = self.study.chosen(small=self.small)
        return {name: arm for name, arm in self.study.arms.items() if name in whole or self.runs.get(name)}

    @property
    def filled(self) -> list[str]:
        """The rows of the whole table with as many seeds as a table needs."""
        whole = self.study.chosen(small=self.small)
        return [name for name in whole if len(self.runs.get(name, {})) >= SEEDS]

    @property
    def partial(self) -> bool:
        """Whether too little is there for it to count as run."""
        return 2 * len(self.filled) < len(self.study.chosen(small=self.small))

    @property
    def usual(self) -> bool:
        """Whether its runs were trained as the data set's protocol has it."""
        protocol = self.study.usual(self.shared["data"], self.about["train"], self.about["size"])
        plain = Arm("", network=None if self.study.many_networks else protocol.network)
        common = shared_part(self.study, run_config(protocol, plain, 0)) | {"size": self.shared["size"]}
        return said(common) == said(self.shared)

    @property
    def name(self) -> str:
        """What its files are called; with a digest where the settings or the data set's name are others."""
        data, network = in_files(self.shared["data"]), self.shared.get("network")
        name = f"{self.study.name}-{data}"
        if self.usual and data == self.shared["data"]:
            return name
        told = run_key(self.shared)[:6]
        return f"{name}-{told}" if network is None else f"{name}-{network}-{told}"

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """The last epoch's measure by seed."""
        found = {seed: run["epochs"][-1].get(measure) for seed, run in self.runs.get(arm, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def tables(study: Study, records: Iterable[dict[str, Any]]) -> list[Table]:
    """The tables that these records fill, the one with most runs first.

    Raises:
        DataError: records of equal settings are of different images.
    """
    found: dict[str, Table] = {}
    for record in records:
        arm = _row(study, record["config"])
        if arm is None:
            continue
        shared = shared_part(study, record["config"])
        table = found.setdefault(run_key(shared), Table(study, shared, record["data"]))
        if not same_pictures(table.about, record["data"]):
            raise DataError(
                f"study {study.name}: two data sets named {shared['data']} have records here, and {arm} seed "
                f"{record['config']['seed']} is not of the images of those before it: give each data set a "
                "folder of its own"
            )
        table.about = record["data"] | table.about  # an older record tells less of the same images
        if counts(record):
            table.runs.setdefault(arm, {})[record["config"]["seed"]] = record
        elif record["status"] != "complete" and not record["dirty"]:
            table.failed.append(record)
        else:
            table.changed += 1
    return sorted(found.values(), key=lambda table: -sum(map(len, table.runs.values())))


def _row(study: Study, config: dict[str, Any]) -> str | None:
    """The row that a run belongs to: known by its settings, for a record may come from another study."""
    for name, arm in study.arms.items():
        own = {key: getattr(arm, key) for key in _ROW}
        same = said(own) == said({key: config.get(key) for key in _ROW})
        if same and arm.network in (None, config["network"]):
            return name
    return None


def levels(table: Table) -> list[dict[str, Any]]:
    """Per row: means and spreads over the seeds, the paper's pair, the cost."""
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
    """Every comparison of the study, paired by seed: `paired_difference`, and what it would take.

    "resolution" is the smallest true difference that so many pairs would show with a probability of POWER,
    "needed" the number of pairs that would show one of the size found; None where there is no interval, or
    more than MOST_PAIRS.
    """
    place, told = next((i, m) for i, m in enumerate(table.study.measures) if m.key == measure)
    found = []
    for name, arm in table.arms.items():
        for other in arm.against:
            ours, theirs = arm.paper, table.study.arms[other].paper
            ours, theirs = printed(ours, place), printed(theirs, place)
            paper = None if ours is None or theirs is None else round(ours - theirs, 2)
            row = compared(table.values(name, measure), table.values(other, measure), told)
            found.append({"arm": name, "against": other, "paper": paper} | row)
    return found


def compared(own: dict[int, float], base: dict[int, float], measure: Measure) -> dict[str, Any]:
    """One row's values by seed against another's: `paired_difference` where they have seeds in common."""
    both = sorted(own.keys() & base.keys())
    row: dict[str, Any] = {"n": len(both)}
    if both:
        pairs = [own[s] for s in both], [base[s] for s in both]
        row |= paired_difference(*pairs, lower_is_better=measure.lower_is_better)
        row["each"] = {s: own[s] - base[s] for s in both}
        row |= _power(row)
    return row


def printed(paper: tuple[float, ...] | None, place: int) -> float | None:
    """What the paper prints by the measure of that number."""
    return paper[place] if paper and place < len(paper) else None


def _power(row: dict[str, Any]) -> dict[str, Any]:
    deviation = spread(list(row["each"].values()))
    if row["low"] is None or not deviation:
        return {"resolution": None, "needed": None}
    return {
        "resolution": resolution(deviation, row["n"]),
        "needed": pairs_needed(row["mean"], deviation),
    }


def commits(runs: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many runs are of each commit."""
    found: dict[str, int] = defaultdict(int)
    for run in runs:
        found[run["commit"]] += 1
    return dict(found)
