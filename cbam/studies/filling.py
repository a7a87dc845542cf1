"""A study fills up: the runs without a record are trained, as far as the time reaches.

Seeds go first to last, and all rows of a seed before the next, so that pairs are whole as early as can be.
Several processes may fill one folder: each takes a run that nobody is at.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from cbam import ops
from cbam.errors import ConfigError, DataError, OutputError, StoppedError, first_line
from cbam.studies import machine
from cbam.studies.records import Records, counts, read, same_pictures
from cbam.studies.study import Arm, Study, run_config, run_key, run_name, said
from cbam.studies.training import Keep, Training, trunk
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
        arms: names of rows; None for all that so many images ask for.
        commit: of what this code is a copy, where git cannot say.

    Raises:
        ConfigError: an unknown row, or one that cannot be built.
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
        self.arms = _chosen(study, training.pictures.about, arms)
        self.origin = origin(commit)
        self.failed: dict[str, Exception] = {}  # rows, and why
        about = training.pictures.about
        for arm in self.arms.values():
            training.cost(run_config(protocol, arm, 0))
        for name, record in records.all().items():
            own = record["config"]
            alike = own["data"] == protocol.data and own.get("limit") == protocol.limit
            if alike and not same_pictures(record["data"], about):
                raise DataError(
                    f"{records.path / name} is of other images of the same name: give another --out"
                )

    def runs(self, seeds: int) -> Iterator[Run]:
        """All runs, in the order in which they are trained."""
        for seed in range(seeds):
            for name, arm in self.arms.items():
                config = run_config(self.protocol, arm, seed)
                yield Run(name, config, run_name(self.protocol, name, config))

    def missing(self, seeds: int) -> list[Run]:
        """The runs that have no record yet."""
        return [run for run in self.runs(seeds) if not self._has(run)]

    def fill(self, seeds: int, *, budget: float | None = None, share: float = 1.0) -> int:
        """Train what has no record; how many runs are still without one, for another process or another day.

        Args:
            budget: seconds. A run that would not end in time is not begun, one that does not is given up.
            share: what part this study is of all that the watch watches.

        A row that fails with any other error is left out, and `failed` has the error; the other rows go on.

        Raises:
            DataError, ConfigError, OutputError; KeyboardInterrupt, after which no half record is left.
        """
        began = time.monotonic()
        end = None if budget is None else began + budget
        todo = [run for run in self.missing(seeds) if not self._taken_over(run)]
        for run in todo:
            part = share / len(todo)
            if self._has(run) or run.arm in self.failed or self._taken_over(run):  # by now
                self.watch.advance(part)
            elif end is not None and time.monotonic() + self._least(run) > end:
                self.watch.say("the time is over before another run would be")
                break
            else:
                try:
                    self._train(run, end, part)
                except StoppedError as stop:
                    if stop.exit_code != StoppedError.exit_code:  # by a signal, not by the time
                        raise
                    self._tell(run, str(stop))
                    break
                except (ConfigError, DataError, OutputError):  # every run would meet them
                    raise
                except Exception as error:  # a kernel that does not compile, memory that is too small, ...
                    self.failed[run.arm] = error
                    reason = f"{type(error).__name__}: {first_line(error, 200)}"
                    self._tell(run, f"failed, and its row is left out: {reason}")
        self._forget_trunks(seeds)
        return len(self.missing(seeds))

    def _taken_over(self, run: Run) -> bool:
        """Whether another study had the record, of which there is a copy here now."""
        taken = self.records.take_over(run.name, run.config, self.training.pictures.about)
        if taken is not None:
            self._tell(run, f"taken over from {taken.parent.name}/{taken.name}")
        return taken is not None

    def _train(self, run: Run, end: float | None, share: float) -> None:
        with self.records.claimed(_claim(run)) as mine:
            if not mine or self._has(run):
                self.watch.advance(share)
                return
            self.watch.now(f"{self.study.name}: {self.arms[run.arm].label}, seed {run.config['seed']}")

            keep = self._keep(run, end)

            def on_work(done: float) -> None:
                if keep is None and end is not None and time.monotonic() > end:
                    raise StoppedError("given up, for the time is over; it begins anew next time")
                self.watch.advance(share * done)

            measured = self.training.run(run.config, on_work, keep)
            record = self._head(run) | measured
            self.records.add(self._name(run), record)
            if keep is not None:
                self.records.forget(run.name, others=self.origin["dirty"] is False)
        last = record["epochs"][-1] if record["epochs"] else {}
        told = self._result(last) if counts_or_dirty(record) else record["status"]
        self._tell(run, f"{told}, {record['seconds']:.0f} s")

    def _result(self, last: dict[str, Any]) -> str:
        measure = self.study.measures[0]
        value = last.get(measure.key)
        return f"{measure.title} {'unknown' if value is None else f'{value:.2f} %'}"

    def _keep(self, run: Run, end: float | None) -> Keep | None:
        """A run on ImageNet takes longer than one would train anew; others do not."""
        if self.protocol.small:
            return None

        def of(name: str, config: dict[str, Any], trunk: Keep | None = None) -> Keep:
            about = {"config": config, "data": self.training.pictures.about, "source": self.origin["source"]}
            return Keep(self.records.unfinished(name), run.name, about, end, self.watch.say, trunk)

        own = of(_claim(run), trunk(run.config)) if run.config["forked"] else None
        return of(run.name, run.config, own)

    def _forget_trunks(self, seeds: int) -> None:
        """Remove what forks begin with, where none of this call's rows needs it any more."""
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
        """A run of changed code has a name of its own: it must not stand in for the one that counts."""
        if self.origin["dirty"] is False:
            return run.name
        return f"{run.name}.dirty-{self.origin['source'][:8]}"

    def _expected(self, run: Run, known: Iterable[dict[str, Any]]) -> float:
        """Seconds that a run of these settings took on such a device, by these records; 0 where none tells.

        Where there is none, those of a pass of the same network over images of the same size, as often as
        this run makes one. The median: the first run of a process also compiles kernels and looks for the
        fastest convolutions.
        """
        about, device = self.training.pictures.about, machine.describe(self.training.device)
        here = [r for r in known if counts_or_dirty(r) and r["device"] == device]
        own = [r["seconds"] for r in here if _but_seed(r["config"]) == _but_seed(run.config)]
        if own:
            return statistics.median(own)
        passes = [
            record["seconds"] / _passes(record["config"], record["data"])
            for record in here
            if (record["config"]["network"], record["data"]["size"]) == (run.config["network"], about["size"])
        ]
        return statistics.median(passes) * _passes(run.config, about) if passes else 0.0

    def _least(self, run: Run) -> float:
        """The seconds below which it is no use to begin: those of the whole run, where it cannot be kept."""
        return self._expected(run, self.records.all().values()) if self.protocol.small else 0.0

    def plan(self, seeds: int, earlier: Iterable["Filling"] = ()) -> str:
        """How much there is to do, and how long that takes by the records made on such a device.

        Args:
            earlier: what is filled before, in the same call: this takes over its runs too.
        """
        missing, whole = self.missing(seeds), len(list(self.runs(seeds)))
        about, known = self.training.pictures.about, list(self.records.all().values())
        soon, todo = set(), []
        if self.origin["dirty"] is False:  # no other run is taken over
            soon = {run_key(run.config) for filling in earlier for run in filling.missing(seeds)}
        for run in missing:
            if path := self.records.elsewhere(run.config, about):
                known.append(read(path))
            elif run_key(run.config) not in soon:
                todo.append(run)
        told = (
            f"{self.study.name} on {self.protocol.data}: {whole - len(missing)} of {whole} runs have a record"
        )
        if taken := len(missing) - len(todo):
            told += f", {taken} {'is' if taken == 1 else 'are'} taken over from other studies"
        return told + self._duration(todo, known)

    def _duration(self, todo: list[Run], known: list[dict[str, Any]]) -> str:
        if not todo:
            return ""
        rows = {run.arm: self._expected(run, known) for run in {run.arm: run for run in todo}.values()}
        expected = [seconds for run in todo if (seconds := rows[run.arm])]
        if not expected:
            return "; how long the others take is not known, no such run was made on this device yet"
        some = "" if len(expected) == len(todo) else f"{len(expected)} of "
        return f"; {some}the other {len(todo)} take about {sum(expected) / 3600:.1f} hours one by one"

    def _tell(self, run: Run, what: str) -> None:
        self.watch.say(f"{self.study.name} {run.arm} seed {run.config['seed']}: {what}")


def _claim(run: Run) -> str:
    """What a process takes for a run: for a fork all forks of that network, so that it is trained once."""
    return f"fork-{run_key(trunk(run.config))}" if run.config["forked"] else run.name


def _but_seed(config: dict[str, Any]) -> dict[str, Any]:
    return said(config) | {"seed": None}


def _passes(config: dict[str, Any], about: dict[str, Any]) -> float:
    """How often a run passes an image through its network; a step of training counts as three."""
    return (1 + config["forked"]) * config["epochs"] * (3 * about["train"] + about["val"])


def counts_or_dirty(record: dict[str, Any]) -> bool:
    """Whether a run came to its end, whatever code it ran."""
    return counts(record | {"dirty": False, "commit": "any"})


def origin(commit: str | None) -> dict[str, Any]:
    """Which code runs here: its commit, whether that was changed, and a digest of the sources.

    Args:
        commit: said by the caller, for a copy without git; where git knows better, it is refused.

    Raises:
        ConfigError: git says another commit.
    """
    found, source = machine.commit(), machine.source()
    if found is None:
        return {"commit": commit, "dirty": None if commit is None else False, "source": source}
    own = found.removesuffix("+changes")
    if commit is not None and not own.startswith(commit):
        raise ConfigError(f"--commit {commit}: this is a checkout of {own}; leave --commit out")
    return {"commit": own, "dirty": found != own, "source": source}


def _chosen(study: Study, about: dict[str, Any], arms: Iterable[str] | None) -> dict[str, Arm]:
    """The rows of that name, or those of the whole table, which a few images of a large set make small."""
    if arms is None:
        return study.chosen(small=study.is_small(about["train"]))
    names = list(arms)
    unknown = [name for name in names if name not in study.arms]
    if unknown or not names:
        raise ConfigError(
            f"study {study.name} has no row {', '.join(unknown)}; its rows: {', '.join(study.arms)}"
        )
    return {name: arm for name, arm in study.arms.items() if name in names}
