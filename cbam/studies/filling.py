"""Fill a study: train the runs that have no record, as far as the time allows.

All rows of one seed are trained before the next seed, so that pairs are complete as early as possible.
Several processes may fill one folder: each claims a run that no other process is training.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from cbam import ops
from cbam.errors import ConfigError, DataError, OutputError, StoppedError, first_line
from cbam.studies import machine
from cbam.studies.records import Records, counts, read, same_images
from cbam.studies.study import Arm, Study, explicit, run_config, run_key, run_name
from cbam.studies.training import Checkpoints, Training, trunk
from cbam.train.versions import versions
from cbam.train.watch import Silent, Watch


class Run(NamedTuple):
    """One run of a study: its row, its settings, the name of its record."""

    arm: str
    config: dict[str, Any]
    name: str


class Filling:
    """The runs of a study by one protocol, on one device.

    Args:
        arms: names of rows; None for those of the whole table for a data set of this size.
        commit: the commit that this code is a copy of, where git cannot tell.

    Raises:
        ConfigError: a row is unknown, or cannot be built.
        DataError: the folder holds records of other images under the same name.
    """

    def __init__(
        self,
        study: Study,
        records: Records,
        training: Training,
        *,
        arms: Iterable[str] | None = None,
        commit: str | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.study, self.records, self.training = study, records, training
        self.protocol = protocol = training.protocol
        self.watch = watch or Silent()
        self.arms = _select_arms(study, training.pictures.about, arms)
        self.origin = origin(commit)
        self.failed: dict[str, Exception] = {}  # by row
        about = training.pictures.about
        for arm in self.arms.values():
            training.cost(run_config(protocol, arm, 0))
        for name, record in records.all().items():
            own = record["config"]
            alike = own["data"] == protocol.data and own.get("limit") == protocol.limit
            if alike and not same_images(record["data"], about):
                raise DataError(
                    f"{records.path / name} is of other images of the same name: give another --out"
                )

    def runs(self, seeds: int) -> Iterator[Run]:
        """All runs, in training order."""
        for seed in range(seeds):
            for name, arm in self.arms.items():
                config = run_config(self.protocol, arm, seed)
                yield Run(name, config, run_name(self.protocol, name, config))

    def missing(self, seeds: int) -> list[Run]:
        """The runs that have no record yet."""
        return [run for run in self.runs(seeds) if not self._has(run)]

    def fill(self, seeds: int, *, budget: float | None = None, share: float = 1.0) -> int:
        """Train the runs that have no record; returns how many still have none.

        Args:
            budget: seconds. A run not expected to end in time is not started; one that does not is abandoned.
            share: the fraction of the watch's total that this study is.

        A row that fails with any other error is left out, and `failed` holds the error; the other rows go on.

        Raises:
            DataError, ConfigError, OutputError; KeyboardInterrupt, which leaves no partial record.
        """
        began = time.monotonic()
        end = None if budget is None else began + budget
        todo = [run for run in self.missing(seeds) if not self._reused(run)]
        for run in todo:
            part = share / len(todo)
            if self._has(run) or run.arm in self.failed or self._reused(run):  # meanwhile
                self.watch.advance(part)
            elif end is not None and time.monotonic() + self._seconds_needed(run) > end:
                self.watch.say("no time is left for another run")
                break
            else:
                try:
                    self._train(run, end, part)
                except StoppedError as stop:
                    if stop.exit_code != StoppedError.exit_code:  # by a signal, not by the time limit
                        raise
                    self._log(run, str(stop))
                    break
                except (ConfigError, DataError, OutputError):  # every run would raise them
                    raise
                except Exception as error:  # a kernel that does not compile, too little memory, ...
                    self.failed[run.arm] = error
                    reason = f"{type(error).__name__}: {first_line(error, 200)}"
                    self._log(run, f"failed, and its row is left out: {reason}")
        self._forget_trunks(seeds)
        return len(self.missing(seeds))

    def _reused(self, run: Run) -> bool:
        """Whether another study has the record; if so, it is copied here."""
        reused = self.records.reuse(run.name, run.config, self.training.pictures.about)
        if reused is not None:
            self._log(run, f"reused from {reused.parent.name}/{reused.name}")
        return reused is not None

    def _train(self, run: Run, end: float | None, share: float) -> None:
        with self.records.claimed(_claim(run)) as mine:
            if not mine or self._has(run):
                self.watch.advance(share)
                return
            self.watch.now(f"{self.study.name}: {self.arms[run.arm].label}, seed {run.config['seed']}")

            checkpoints = self._checkpoints(run, end)

            def on_work(done: float) -> None:
                if checkpoints is None and end is not None and time.monotonic() > end:
                    raise StoppedError("abandoned at the time limit; it starts over next time")
                self.watch.advance(share * done)

            measured = self.training.run(run.config, on_work, checkpoints)
            record = self._head(run) | measured
            self.records.add(self._name(run), record)
            if checkpoints is not None:
                self.records.forget(run.name, others=self.origin["dirty"] is False)
        last = record["epochs"][-1] if record["epochs"] else {}
        outcome = self._result(last) if is_complete(record) else record["status"]
        self._log(run, f"{outcome}, {record['seconds']:.0f} s")

    def _result(self, last: dict[str, Any]) -> str:
        measure = self.study.measures[0]
        value = last.get(measure.key)
        return f"{measure.title} {'unknown' if value is None else f'{value:.2f} %'}"

    def _checkpoints(self, run: Run, end: float | None) -> Checkpoints | None:
        """Where to save a run on the paper's data; None for short runs, which start over instead."""
        if self.protocol.small:
            return None

        def of(name: str, config: dict[str, Any], trunk: Checkpoints | None = None) -> Checkpoints:
            about = {"config": config, "data": self.training.pictures.about, "source": self.origin["source"]}
            return Checkpoints(self.records.unfinished(name), run.name, about, end, self.watch.say, trunk)

        own = of(_claim(run), trunk(run.config)) if run.config["forked"] else None
        return of(run.name, run.config, own)

    def _forget_trunks(self, seeds: int) -> None:
        """Remove the checkpoints of trunks that no missing fork of this call needs."""
        forks = [run for run in self.runs(seeds) if run.config["forked"]]
        needed = {_claim(run) for run in forks if not self._has(run)}
        for claim in {_claim(run) for run in forks} - needed:
            if self.records.has_unfinished(claim):
                with self.records.claimed(claim) as mine:
                    if mine:
                        self.records.forget(claim, others=self.origin["dirty"] is False)

    def _head(self, run: Run) -> dict[str, Any]:
        """The part of a record that is known before the run."""
        device = self.training.device
        return {
            "study": self.study.name,
            "arm": run.arm,
            "seed": run.config["seed"],
            "config": run.config,
            "data": self.training.pictures.about,
            **self.origin,
            "versions": versions(),
            "device": machine.describe(device),
            "kernels": ops.fused(torch.ones(1, 1, 1, 1, device=device)),
        }

    def _has(self, run: Run) -> bool:
        return self.records.has(run.name) or (
            self.origin["dirty"] is not False and self.records.has(self._name(run))
        )

    def _name(self, run: Run) -> str:
        """The name of a run's record; one of modified code never takes the place of one that counts."""
        if self.origin["dirty"] is False:
            return run.name
        return f"{run.name}.dirty-{self.origin['source'][:8]}"

    def _expected(self, run: Run, known: Iterable[dict[str, Any]]) -> float:
        """The seconds that a run is expected to take, from records of this device; 0 if there are none.

        From runs of the same settings, or else scaled by passes from runs of the same network and image
        size. The median, since the first run of a process also compiles kernels and benchmarks convolutions.
        """
        about, device = self.training.pictures.about, machine.describe(self.training.device)
        here = [r for r in known if is_complete(r) and r["device"] == device]
        own = [r["seconds"] for r in here if _without_seed(r["config"]) == _without_seed(run.config)]
        if own:
            return statistics.median(own)
        passes = [
            record["seconds"] / _passes(record["config"], record["data"])
            for record in here
            if (record["config"]["network"], record["data"]["size"]) == (run.config["network"], about["size"])
        ]
        return statistics.median(passes) * _passes(run.config, about) if passes else 0.0

    def _seconds_needed(self, run: Run) -> float:
        """The seconds below which starting a run is no use: all of it if it cannot be resumed, else 0."""
        return self._expected(run, self.records.all().values()) if self.protocol.small else 0.0

    def plan(self, seeds: int, earlier: Iterable["Filling"] = ()) -> str:
        """What there is to do, and how long it takes, judging by the records of this device.

        Args:
            earlier: studies filled before this one in the same call, whose runs it will reuse.
        """
        missing, whole = self.missing(seeds), len(list(self.runs(seeds)))
        about, known = self.training.pictures.about, list(self.records.all().values())
        soon, todo = set(), []
        if self.origin["dirty"] is False:  # runs of modified code are not reused
            soon = {run_key(run.config) for filling in earlier for run in filling.missing(seeds)}
        for run in missing:
            if path := self.records.find_elsewhere(run.config, about):
                known.append(read(path))
            elif run_key(run.config) not in soon:
                todo.append(run)
        progress = (
            f"{self.study.name} on {self.protocol.data}: {whole - len(missing)} of {whole} runs have a record"
        )
        if reused := len(missing) - len(todo):
            progress += f", {reused} {'is' if reused == 1 else 'are'} reused from other studies"
        return progress + self._duration(todo, known)

    def _duration(self, todo: list[Run], known: list[dict[str, Any]]) -> str:
        if not todo:
            return ""
        rows = {run.arm: self._expected(run, known) for run in {run.arm: run for run in todo}.values()}
        expected = [seconds for run in todo if (seconds := rows[run.arm])]
        if not expected:
            return "; the time for the others is not known, since no such run was made on this device yet"
        some = "" if len(expected) == len(todo) else f"{len(expected)} of "
        return f"; {some}the other {len(todo)} take about {sum(expected) / 3600:.1f} hours, one at a time"

    def _log(self, run: Run, what: str) -> None:
        self.watch.say(f"{self.study.name} {run.arm} seed {run.config['seed']}: {what}")


def _claim(run: Run) -> str:
    """What a process claims for a run; all forks of a network share one, so that it is trained once."""
    return f"fork-{run_key(trunk(run.config))}" if run.config["forked"] else run.name


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    return explicit(config) | {"seed": None}


def _passes(config: dict[str, Any], about: dict[str, Any]) -> float:
    """How many image passes a run makes; an image in training counts as three."""
    return (1 + config["forked"]) * config["epochs"] * (3 * about["train"] + about["val"])


def is_complete(record: dict[str, Any]) -> bool:
    """Whether a run was completed, even with modified code."""
    return counts(record | {"dirty": False, "commit": "any"})


def origin(commit: str | None) -> dict[str, Any]:
    """Which code runs here: its commit, whether it is modified, and a digest of the sources.

    Args:
        commit: the caller's statement, for a copy without git.

    Raises:
        ConfigError: git knows the commit, and it is another one.
    """
    found, source = machine.commit(), machine.source()
    if found is None:
        return {"commit": commit, "dirty": None if commit is None else False, "source": source}
    own = found.removesuffix("+changes")
    if commit is not None and not own.startswith(commit):
        raise ConfigError(f"--commit {commit}: this is a checkout of {own}; omit --commit")
    return {"commit": own, "dirty": found != own, "source": source}


def _select_arms(study: Study, about: dict[str, Any], arms: Iterable[str] | None) -> dict[str, Arm]:
    """The named rows, or else the whole table's, which depend on how many images are used."""
    if arms is None:
        return study.chosen(small=study.is_small(about["train"]))
    names = list(arms)
    unknown = [name for name in names if name not in study.arms]
    if unknown or not names:
        raise ConfigError(
            f"study {study.name} has no row {', '.join(unknown)}; its rows: {', '.join(study.arms)}"
        )
    return {name: arm for name, arm in study.arms.items() if name in names}
