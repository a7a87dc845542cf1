"""Plain against attention, paired by seed: what `cbam compare` runs.

For each seed a plain network is trained (the start), then forked; attention is attached to the forks with the
identity start, so that every arm begins as the same function, and every arm, including the plain one, is
trained for as many epochs again. `pretrained` replaces the first training by weights from a file;
`from_scratch` is the paper's protocol: no start, every arm from the same seed. Arms of one seed see the same
images with the same augmentation in the same order. The last epoch is scored, never the best.
"""

import copy
import datetime
import os
import time
from dataclasses import asdict

import torch
from torch import nn

from cbam.data.parquet import check_output_folder
from cbam.errors import CBAMError
from cbam.explain import Row, comparison_figure
from cbam.models import profile
from cbam.studies import machine
from cbam.studies.folder import DRAWING, PAGE, PICTURE, REPORT, WEIGHTS, ReportFolder
from cbam.studies.look import (
    GRADCAM_WORK,
    first_batch,
    logits_of,
    look,
    mean_energy_inside,
    rows_of_picture,
)
from cbam.studies.page import page
from cbam.studies.report import LABELS, markdown
from cbam.studies.settings import Settings
from cbam.studies.speed import interleaved
from cbam.studies.task import Task, load, refine
from cbam.surgery import attached
from cbam.train import evaluate, fit, pick_device
from cbam.train.material import taken
from cbam.train.versions import versions
from cbam.train.watch import Silent, Watch

SCHEMA = 1


def compare(
    settings: Settings, folder: ReportFolder | str | os.PathLike, *, watch: Watch | None = None
) -> dict:
    """Run a comparison and write its report; returns the contents of results.json.

    Args:
        folder: where the report goes; a path must be empty or not exist yet, see `ReportFolder`.

    results.json is written after every finished training. If the run ends early, by Ctrl-C or an error,
    what is finished is reported before the exception is raised again.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError, NonFiniteError, MissingExtraError.
    """
    if not isinstance(folder, ReportFolder):
        folder = ReportFolder(folder)
    return _Comparison(settings, folder, watch or Silent()).run()


class _Comparison:
    def __init__(self, settings: Settings, folder: ReportFolder, watch: Watch) -> None:
        self.settings, self.folder, self.watch = settings, folder, watch
        self.device = pick_device(settings.device)
        if settings.data:
            check_output_folder(settings.data, folder.path)
        self.task = Task.of(settings)
        self.names = ["plain", *settings.attention]
        self.start = "paper" if settings.from_scratch else "identity"  # of attention
        self.results = _new_record(settings, self.task, self.device)
        self.kept: dict[str, nn.Module] = {}  # the models shown in the image
        self.rows: list[Row] = []
        self.began = time.monotonic()

    def run(self) -> dict:
        self._announce()
        try:
            self._measure_cost()
            for seed in range(self.settings.seeds):
                self._run_seed(seed)
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.results["status"] = "interrupted" if stopped else f"{type(error).__name__}: {error}"
            if self.results["runs"]:
                self._write_report()
            raise
        self.results["status"] = "complete"
        self._write_report()
        return self.results

    # --- the protocol ---

    def _run_seed(self, seed: int) -> None:
        start = self.task.plain(seed, self.settings.pretrained)
        if "start" in self.results["recipes"]:
            history = self._fit(start, f"seed {seed}: plain, before the fork", seed, 0)
            self.results["starts"].append({"seed": seed, "history": history})
        for name in self.names:
            model = copy.deepcopy(start)
            identity = None if name == "plain" else self._attach(model, name, seed, start)
            first_epoch = len(self.results["starts"][-1]["history"]) if self.results["starts"] else 0
            history = self._fit(model, f"seed {seed}: {LABELS[name]}", seed, first_epoch)
            if self.settings.save_weights:
                self._save(model, f"{name}-seed{seed}{WEIGHTS}")
            self._score(model, name, seed, identity, history)
            if seed == 0 and name in ("plain", self.results["picture"]["arm"]):
                self.kept[name] = model
        if seed == 0:
            self._draw()

    def _attach(self, model: nn.Module, name: str, seed: int, start: nn.Module) -> dict | None:
        """Attach in place; with the identity start, compare the logits before and after bit by bit."""
        refine(model, name, seed, self.start)
        if self.settings.from_scratch:
            return None
        images, _ = first_batch(self.task.val, self.task.recipe.batch_size)
        before, after = (logits_of(each, images, self.device) for each in (start, model))
        equal = torch.equal(before, after)
        self.watch.say(
            f"seed {seed}: {LABELS[name]} attached at {len(attached(model))} places, logits on {len(images)} "
            f"validation images {'bit-identical' if equal else 'NOT bit-identical'} before and after"
        )
        largest = (before - after).abs().max().item()
        return {"pictures": len(images), "bit_equal": equal, "largest_difference": largest}

    def _fit(self, model: nn.Module, what: str, seed: int, first_epoch: int) -> list[dict]:
        self.watch.now(what)
        return fit(
            model,
            self.task.train,
            self.task.val,
            self.task.recipe,
            seed=seed,
            device=self.settings.device,
            first_epoch=first_epoch,
            workers=self.settings.workers,
            on_step=self._advance,
        )

    def _score(self, model: nn.Module, name: str, seed: int, identity: dict | None, history: list) -> None:
        self.watch.now(f"seed {seed}: {LABELS[name]}, scoring")
        val, batch, workers = self.task.val, 2 * self.task.recipe.batch_size, self.settings.workers
        scored = evaluate(
            model, val, batch_size=batch, device=self.settings.device, workers=workers, on_step=self._advance
        )
        inside = None
        if val.has_boxes:
            inside = mean_energy_inside(
                model, val, batch_size=batch, device=self.device, workers=workers, on_step=self._advance
            )
        self.results["runs"].append(
            {
                "arm": name,
                "seed": seed,
                "top1": scored.top1,
                "top5": scored.top5,
                "loss": scored.loss,
                "energy_inside": inside,
                "identity": identity,
                "history": history,
            }
        )
        self._write_results()

    def _save(self, model: nn.Module, name: str) -> None:
        from safetensors.torch import save

        self.folder.write(name, save({key: value.contiguous() for key, value in model.state_dict().items()}))

    # --- before training ---

    def _announce(self) -> None:
        """Say what runs where, and reject a weights file that does not fit before any work is done."""
        data = self.results["data"]
        self.watch.say(
            f"{data['name']}: {data['train']} training and {data['val']} validation images of "
            f"{data['size']} px, {len(data['classes'])} classes; {self.task.network} on "
            f"{self.results['device']['name']} ({self.device.type})"
        )
        for note in data["notes"]:
            self.watch.say(f"note: {note}")
        if self.settings.pretrained:
            loaded = load(self.task.plain(0), self.settings.pretrained)
            self.watch.say(taken(self.settings.pretrained, loaded))

    def _measure_cost(self) -> None:
        """Parameters, multiply-accumulates and times of the arms; none of them needs trained weights."""
        self.watch.now("measuring the cost of every arm")
        train, arms = self.task.train, {name: self.task.plain(0) for name in self.names}
        for name, model in arms.items():
            if name != "plain":
                refine(model, name, 0, self.start)
            cost, places = profile(model, train.size), len(attached(model))
            self.results["arms"].append(
                {"name": name, "parameters": cost.parameters, "gmac": cost.gmac, "sites": places}
            )
        images, targets = first_batch(train, self.task.recipe.batch_size)
        self.results["timing"] = interleaved(arms, images, targets, self.task.recipe, self.device)

    def _advance(self, passes: float) -> None:
        """Report more single-image forward passes; an image in training counts as three."""
        n_train, n_val = len(self.task.train), len(self.task.val)
        training = self.task.recipe.epochs * (3 * n_train + n_val)
        scoring = n_val * (1 + GRADCAM_WORK * self.task.val.has_boxes)
        start = training * ("start" in self.results["recipes"])
        total = self.settings.seeds * (start + len(self.names) * (training + scoring))
        self.watch.advance(passes / total)

    # --- output ---

    def _draw(self) -> None:
        """Compute the rows of the image with the models of the first seed."""
        self.watch.now("drawing the image")
        shown = self.results["picture"]
        try:
            self.rows = look(self.kept["plain"], self.kept[shown["arm"]], self.task.val, shown["indices"])
        except CBAMError as error:  # a missing image must not cost the numbers
            self.watch.say(f"the image is left out: {error}")
        self.kept.clear()

    def _write_results(self) -> None:
        self.results["seconds"] = time.monotonic() - self.began
        self.results["memory_gib"] = machine.largest_memory()
        self.folder.write_results(self.results)

    def _write_report(self) -> None:
        self._write_results()
        picture = None
        if self.rows:
            label = LABELS[self.results["picture"]["arm"]]
            for name in (PICTURE, DRAWING):
                comparison_figure(self.rows, self.folder.path / name, refined=label)
            picture = (self.folder.path / PICTURE).read_bytes()
        self.folder.write(REPORT, markdown(self.results, PICTURE if picture else None))
        self.folder.write(PAGE, page(self.results, picture))


def _new_record(settings: Settings, task: Task, device: torch.device) -> dict:
    """results.json before anything has run."""
    recipe, train, val = task.recipe, task.train, task.val
    used = {"model": task.network, **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "lr")}}
    phases = ["arms"] if settings.from_scratch or settings.pretrained else ["start", "arms"]
    rows = rows_of_picture(val)
    return {
        "schema": SCHEMA,
        "status": "running",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": asdict(settings) | used,
        "protocol": _protocol(settings, recipe.epochs),
        "recipes": {phase: asdict(recipe) for phase in phases},
        "versions": versions(),
        "commit": machine.commit(),
        "device": machine.describe(device),
        "data": {
            "name": train.name,
            "train": len(train),
            "val": len(val),
            "size": train.size,
            "classes": train.classes,
            "has_boxes": val.has_boxes,
            "mean": list(train.mean),
            "std": list(train.std),
            "notes": list(dict.fromkeys([*train.notes, *val.notes])),
        },
        "arms": [],
        "timing": {},
        "starts": [],
        "runs": [],
        "picture": {
            "arm": "cbam" if "cbam" in settings.attention else settings.attention[-1],
            "seed": 0,
            "rows": len(rows),
            "indices": rows,
        },
        "seconds": 0.0,
        "memory_gib": 0.0,
    }


def _protocol(settings: Settings, epochs: int) -> str:
    if settings.from_scratch:
        return f"every arm from scratch for {epochs} epochs, attention initialised as in the paper"
    start = f"weights of {settings.pretrained}" if settings.pretrained else f"plain for {epochs} epochs"
    return f"{start}, then forked, attention at the identity start, every arm for {epochs} epochs"
