"""Plain against attention, paired by seed: what `cbam compare` runs.

Per seed a plain network is trained (the start), then forked; attention is attached to the forks at the
identity start, so that every arm begins with the same function, and every arm, the plain one too, is trained
for as many epochs again. `pretrained` replaces the first training by weights from a file; `from_scratch` is
the paper's protocol: no start, every arm from the same seed. Arms of one seed see the same pictures,
augmented alike, in the same order. What is scored is the last epoch, never the best.

The recipe, fixed before any arm was compared, from the plain network's training alone:
- SGD with momentum 0.9 and weight decay 1e-4 on every parameter is the paper's. Half a cosine to zero
  replaces its steps, which are made for 90 epochs; it needs no epochs to be chosen.
- Learning rate 0.05, which a short run of a few hundred steps bears without a warm-up. After the fork the
  same again, a warm restart (arXiv 1608.03983): attention, which is new, then sees the rates that the
  network saw. Weights from a file are trained on at a tenth of it, as is usual for fine-tuning.
- The digits: batch 32 and 8 epochs twice, so that three seeds stay below four minutes on two CPU cores. The
  plain network comes down from 90 % (chance) to about 12 % error, which leaves room on both sides.
"""

import copy
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cbam.data import Images, cluttered_digits, image_folder, loader
from cbam.errors import CheckpointError
from cbam.explain import Row, compare_rows, comparison_figure, energy_inside, gradcam
from cbam.models import build, profile
from cbam.nn import CBAM, ChannelAttention, SpatialAttention, squeeze_excitation
from cbam.studies import machine
from cbam.studies.folder import DRAWING, PAGE, PICTURE, REPORT, ReportFolder
from cbam.studies.page import page
from cbam.studies.report import LABELS, markdown
from cbam.studies.settings import Settings
from cbam.studies.speed import interleaved
from cbam.surgery import attach, attached, load_weights
from cbam.train import Recipe, evaluate, fit, pick_device
from cbam.train.classification import normalise

SCHEMA = 1
ROWS = 5
MEMORY = 256 << 20  # bytes of validation pictures that are kept
DIGITS, FOLDER = {"epochs": 8, "batch_size": 32}, {"epochs": 10, "batch_size": 64}
LR, FINE_TUNING_LR = 0.05, 0.005


def _spatial(channels: int) -> SpatialAttention:
    return SpatialAttention()


ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "cbam": CBAM,
    "se": squeeze_excitation,
    "channel": ChannelAttention,
    "spatial": _spatial,
}


class Watch(Protocol):
    """What a comparison tells while it runs."""

    def say(self, line: str) -> None:
        """A line of lasting interest."""

    def now(self, what: str) -> None:
        """What is running from here on."""

    def advance(self, share: float) -> None:
        """How much more of the whole, out of 1, is done."""


class Silent:
    """A `Watch` that tells nobody."""

    def say(self, line: str) -> None: ...

    def now(self, what: str) -> None: ...

    def advance(self, share: float) -> None: ...


def compare(settings: Settings, folder: ReportFolder, *, watch: Watch | None = None) -> dict:
    """Run a comparison and write its report; returns the content of results.json.

    results.json is written after every finished training. When the run ends early, by Ctrl-C or by an
    error, what is finished is reported before the exception goes on.

    Raises:
        ConfigError, DataError, CheckpointError, OutputError, NonFiniteError, MissingExtraError.
    """
    return _Comparison(settings, folder, watch or Silent()).run()


@dataclass
class _Arm:
    """One line of training: a model, where it stands, and what is written about it."""

    name: str
    model: nn.Module
    identity: dict | None = None
    blocks: list[str] = field(default_factory=list)


class _Comparison:
    def __init__(self, settings: Settings, folder: ReportFolder, watch: Watch) -> None:
        self.settings, self.folder, self.watch = settings, folder, watch
        self.device = pick_device(settings.device)
        self.train, self.val = _data(settings)
        self.network = settings.model or ("resnet18" if settings.data else "resnet_tiny")
        self.recipe = _recipe(settings)
        self.names = ["plain", *settings.attention]
        self.results = self._record()
        self.kept: dict[str, nn.Module] = {}
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.total = self._work()

    def run(self) -> dict:
        self._announce()
        try:
            self._measure_cost()
            for seed in range(self.settings.seeds):
                self._run_seed(seed)
            self.results["status"] = "complete"
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.results["status"] = (
                "interrupted" if stopped else f"stopped by {type(error).__name__}: {error}"
            )
            if self.results["runs"]:
                self._write_report()
            raise
        self._write_report()
        return self.results

    # --- the protocol ---

    def _run_seed(self, seed: int) -> None:
        start = self._start(seed)
        for name in self.names:
            arm = self._arm(name, seed, start)
            history = self._fit(arm.model, f"seed {seed}: {LABELS[name]}", seed, self._first_epoch())
            self._score(arm, seed, history)
            if seed == 0 and name in ("plain", self.results["picture"]["arm"]):
                self.kept[name] = arm.model
        if seed == 0:
            self._draw()

    def _start(self, seed: int) -> nn.Module:
        """The network that the arms of this seed fork from, on the CPU."""
        model = self._build(seed)
        if self.settings.pretrained:
            loaded = _load(model, self.settings.pretrained)
            if seed == 0:
                head = (
                    ", but for the last layer, which is made for other classes" if loaded.head_reset else ""
                )
                self.watch.say(f"weights of {self.settings.pretrained}: {loaded.tensors} tensors taken{head}")
        elif not self.settings.from_scratch:
            history = self._fit(model, f"seed {seed}: plain, before the fork", seed, 0)
            self.results["starts"].append({"seed": seed, "history": history})
        return model

    def _build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(self.network, num_classes=len(self.train.classes))

    def _arm(self, name: str, seed: int, start: nn.Module) -> _Arm:
        model = copy.deepcopy(start)
        if name == "plain":
            return _Arm(name, model)
        how = "paper" if self.settings.from_scratch else "identity"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attach(model, attention=ATTENTION[name], start=how)
        arm = _Arm(name, model, blocks=list(attached(model)))
        if how == "identity":
            arm.identity = self._check_identity(start, model)
            equal = "bit-equal" if arm.identity["bit_equal"] else "NOT bit-equal"
            self.watch.say(
                f"seed {seed}: {LABELS[name]} attached at {len(arm.blocks)} places, "
                f"logits on {arm.identity['pictures']} validation pictures {equal} before and after"
            )
        return arm

    def _check_identity(self, plain: nn.Module, refined: nn.Module) -> dict:
        images, _, _ = self._batch(self.val, self.recipe.batch_size)
        before, after = (self._logits(model, images) for model in (plain, refined))
        return {
            "pictures": len(images),
            "bit_equal": torch.equal(before, after),
            "largest_difference": (before - after).abs().max().item(),
        }

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        model = model.to(self.device).eval()
        with torch.inference_mode():
            logits = model(images.to(self.device)).cpu()
        model.to("cpu")
        return logits

    def _fit(self, model: nn.Module, what: str, seed: int, first_epoch: int) -> list[dict]:
        self.watch.now(what)
        return fit(
            model,
            self.train,
            self.val,
            self.recipe,
            seed=seed,
            device=self.settings.device,
            first_epoch=first_epoch,
            workers=self.settings.workers,
            on_step=self._advance,
        )

    def _first_epoch(self) -> int:
        return self.recipe.epochs if self.results["starts"] else 0

    def _score(self, arm: _Arm, seed: int, history: list[dict]) -> None:
        self.watch.now(f"seed {seed}: {LABELS[arm.name]}, scoring")
        batch, workers = 2 * self.recipe.batch_size, self.settings.workers
        scored = evaluate(
            arm.model,
            self.val,
            batch_size=batch,
            device=self.settings.device,
            workers=workers,
            on_step=self._advance,
        )
        run = {
            "arm": arm.name,
            "seed": seed,
            "top1": scored.top1,
            "top5": scored.top5,
            "loss": scored.loss,
            "energy_inside": self._energy_inside(arm.model) if self.val.has_boxes else None,
            "identity": arm.identity,
            "blocks": arm.blocks,
            "history": history,
        }
        self.results["runs"].append(run)
        self._write_results()

    def _energy_inside(self, model: nn.Module) -> float | None:
        """Mean share of Grad-CAM's energy inside the true box, in %, over validation pictures with a box."""
        model = model.to(self.device)
        shares = []
        for batch in loader(self.val, 2 * self.recipe.batch_size, train=False, workers=self.settings.workers):
            images = normalise(batch["image"], self.val.mean, self.val.std).to(self.device)
            maps = gradcam(model, images, batch["target"]).cpu()
            shares.append(energy_inside(maps, batch["box"]))
            self._advance(_GRADCAM * len(images))
        model.to("cpu")
        known = torch.cat(shares)
        known = known[~known.isnan()]
        return 100 * known.mean().item() if len(known) else None

    # --- cost ---

    def _measure_cost(self) -> None:
        """Parameters, multiply-accumulates and times of the arms; before training, for none needs weights."""
        self.watch.now("measuring the cost of every arm")
        plain = self._build(0)
        arms = {name: self._arm_for_cost(name, plain) for name in self.names}
        for name, arm in arms.items():
            cost = profile(arm, self.train.size)
            self.results["arms"].append(
                {"name": name, "parameters": cost.parameters, "gmac": cost.gmac, "sites": len(attached(arm))}
            )
        images, targets, _ = self._batch(self.train, self.recipe.batch_size)
        self.results["timing"] = interleaved(arms, images, targets, self.recipe, self.device)

    def _arm_for_cost(self, name: str, plain: nn.Module) -> nn.Module:
        model = copy.deepcopy(plain)
        return model if name == "plain" else attach(model, attention=ATTENTION[name], start="identity")

    def _batch(self, images: Images, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first pictures of a set: normalised, targets, boxes."""
        batch = next(iter(loader(images, min(count, len(images)), train=False)))
        return normalise(batch["image"], images.mean, images.std), batch["target"], batch["box"]

    # --- what is written ---

    def _draw(self) -> None:
        """The picture, from the models of the first seed."""
        self.watch.now("drawing the picture")
        shown = self.results["picture"]
        samples = [self.val[index] for index in shown["indices"]]
        image = torch.stack([sample["image"] for sample in samples])
        rows = compare_rows(
            self.kept["plain"],
            self.kept[shown["arm"]],
            normalise(image, self.val.mean, self.val.std),
            image,
            torch.tensor([sample["target"] for sample in samples]),
            self.val.classes,
            torch.stack([sample["box"] for sample in samples]),
        )
        self.rows = rows
        self.kept.clear()

    def _write_results(self) -> None:
        self.results["seconds"] = time.monotonic() - self.began
        self.results["memory_gib"] = machine.largest_memory()
        self.folder.write_results(self.results)

    def _write_report(self) -> None:
        self._write_results()
        picture = None
        if self.rows:
            for name in (PICTURE, DRAWING):
                comparison_figure(
                    self.rows, self.folder.path / name, refined=LABELS[self.results["picture"]["arm"]]
                )
            picture = (self.folder.path / PICTURE).read_bytes()
        self.folder.write(REPORT, markdown(self.results, PICTURE if picture else None))
        self.folder.write(PAGE, page(self.results, picture))

    def _record(self) -> dict:
        """results.json before anything has run."""
        config = asdict(self.settings) | {
            "model": self.network,
            "epochs": self.recipe.epochs,
            "batch_size": self.recipe.batch_size,
            "lr": self.recipe.lr,
        }
        phases = ["arms"] if self.settings.from_scratch or self.settings.pretrained else ["start", "arms"]
        indices = _first_of_classes(self.val)
        return {
            "schema": SCHEMA,
            "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": config,
            "protocol": _protocol_told(self.settings, self.recipe),
            "recipes": {phase: asdict(self.recipe) for phase in phases},
            "versions": machine.versions(),
            "commit": machine.commit(),
            "device": machine.describe(self.device),
            "data": {
                "name": self.train.name,
                "train": len(self.train),
                "val": len(self.val),
                "size": self.train.size,
                "classes": self.train.classes,
                "has_boxes": self.val.has_boxes,
                "mean": list(self.train.mean),
                "std": list(self.train.std),
                "notes": list(dict.fromkeys([*self.train.notes, *self.val.notes])),
            },
            "arms": [],
            "timing": {},
            "starts": [],
            "runs": [],
            "picture": {
                "arm": "cbam" if "cbam" in self.settings.attention else self.settings.attention[-1],
                "seed": 0,
                "rows": len(indices),
                "indices": indices,
            },
            "seconds": 0.0,
            "memory_gib": 0.0,
        }

    def _announce(self) -> None:
        data = self.results["data"]
        self.watch.say(
            f"{data['name']}: {data['train']} training and {data['val']} validation pictures of "
            f"{data['size']} px, {len(data['classes'])} classes; {self.network} on "
            f"{self.results['device']['name']} ({self.device.type})"
        )
        for note in data["notes"]:
            self.watch.say(f"note: {note}")

    # --- how far it is ---

    def _work(self) -> float:
        """The whole in forward passes of one picture; a training step counts as three."""
        n_train, n_val = len(self.train), len(self.val)
        training = self.recipe.epochs * (3 * n_train + n_val)
        scoring = n_val * (1 + _GRADCAM * self.val.has_boxes)
        start = training if len(self.results["recipes"]) == 2 else 0
        return self.settings.seeds * (start + len(self.names) * (training + scoring))

    def _advance(self, passes: float) -> None:
        self.watch.advance(passes / self.total)


_GRADCAM = 4  # forward passes of a picture that its Grad-CAM takes


def _data(settings: Settings) -> tuple[Images, Images]:
    train, val = image_folder(settings.data, size=settings.size) if settings.data else cluttered_digits()
    if settings.limit:
        train, val = (images.subset(min(settings.limit, len(images))) for images in (train, val))
    return train, _Remembered(val)


class _Remembered(Images):
    """A validation set that keeps its pictures once they have been read, where they are few."""

    def __init__(self, images: Images) -> None:
        super().__init__(
            images.name,
            images.classes,
            images.targets,
            size=images.size,
            has_boxes=images.has_boxes,
            mean=images.mean,
            std=images.std,
            notes=images.notes,
        )
        self._images = images
        self._kept: dict[int, tuple[Tensor, Sequence[float]]] = {}
        self._room = MEMORY // (3 * images.size**2)

    def sample(self, epoch: int, index: int) -> tuple[Tensor, Sequence[float]]:
        if index in self._kept:
            return self._kept[index]
        sample = self._images.sample(0, index)
        if len(self._kept) < self._room:
            self._kept[index] = sample
        return sample


def _recipe(settings: Settings) -> Recipe:
    usual = FOLDER if settings.data else DIGITS
    return Recipe(
        epochs=settings.epochs or usual["epochs"],
        batch_size=settings.batch_size or usual["batch_size"],
        lr=settings.lr or (FINE_TUNING_LR if settings.pretrained else LR),
    )


def _protocol_told(settings: Settings, recipe: Recipe) -> str:
    if settings.from_scratch:
        return f"every arm from scratch for {recipe.epochs} epochs, attention initialised as in the paper"
    start = (
        f"weights of {settings.pretrained}" if settings.pretrained else f"plain for {recipe.epochs} epochs"
    )
    return f"{start}, then forked, attention at the identity start, every arm for {recipe.epochs} epochs"


def _load(model: nn.Module, path: str):
    try:
        return load_weights(model, path)
    except CheckpointError as misfit:
        try:
            return load_weights(model, path, head="reset")
        except CheckpointError:
            raise misfit from None


def _first_of_classes(images: Images) -> list[int]:
    """The first picture of up to ROWS classes, evenly spaced over the class list."""
    present = sorted(set(images.targets))
    count = min(ROWS, len(present))
    chosen = [present[i * len(present) // count] for i in range(count)]
    return [images.targets.index(target) for target in chosen]
