"""The settings of `cbam compare`. Does not import torch, since the command line builds its help from it."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from cbam.errors import ConfigError
from cbam.train.option import option

ATTENTION = (
    *("cbam", "se", "channel", "spatial", "eca", "scse", "bam", "gc", "coordatt", "simam", "triplet", "gct"),
    *("sk", "gam", "ema"),
)
NO_IDENTITY = ("simam", "sk")  # no identity start: cannot be attached to a trained network


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison. All problems are reported together (`ConfigError`)."""

    data: str | None = option(
        None,
        "image folder: train/ and val/ with one folder per class, or a single folder, which is split "
        "(default: cluttered_digits, handwritten digits among fragments of others)",
    )
    attention: tuple[str, ...] = option(
        ("se", "cbam"),
        f"attention to compare with the plain network: {', '.join(ATTENTION)}; put DATA before this option",
        "NAME",
    )
    model: str | None = option(
        None, "network, see `cbam list` (default: resnet_tiny without DATA, resnet18 with)", "NAME"
    )
    epochs: int | None = option(
        None,
        "epochs of the plain training, and again of every arm after it (default: 8 without DATA, 10 with)",
        "N",
    )
    seeds: int = option(3, "number of seeds; differences are paired by seed", "N")
    batch_size: int | None = option(None, "images per step (default: 32 without DATA, 64 with)", "N")
    lr: float | None = option(None, "peak learning rate (default: 0.05, with --pretrained 0.005)", "RATE")
    size: int | None = option(
        None, "side of the images, in pixels (default: chosen from the folder)", "PIXELS"
    )
    limit: int | None = option(
        None, "use only about N training and N validation images, spread over the classes", "N"
    )
    from_scratch: bool = option(
        False, "the paper's protocol: train every arm from scratch, with the paper's initialisation"
    )
    pretrained: str | None = option(
        None,
        "start from these weights of the plain network instead of training it: .safetensors or .pth, a run "
        "of `cbam train`, or a folder of save_pretrained",
        "FILE",
    )
    save_weights: bool = option(False, "keep the weights of every arm and seed, as safetensors")
    device: str = option("auto", "auto, cpu or cuda", "NAME")
    workers: int = option(0, "processes that load images", "N")

    def __post_init__(self) -> None:
        problems = [text for good, text in self._rules() if not good]
        if problems:
            raise ConfigError("; ".join(problems))

    def _rules(self):
        for name in ("epochs", "seeds", "batch_size", "size", "limit"):
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            good = (value is None and optional) or (type(value) is int and value > 0)
            yield good, f"{name} must be a whole number above 0, got {value!r}"
        good = type(self.workers) is int and 0 <= self.workers <= 1024
        yield good, f"workers must be 0 to 1024, got {self.workers!r}"
        good = self.lr is None or (type(self.lr) in (int, float) and 0 < self.lr < 1e6)
        yield good, f"lr must be a number above 0, got {self.lr!r}"
        yield self.device in ("auto", "cpu", "cuda"), f"device must be auto, cpu or cuda, got {self.device!r}"
        yield len(self.attention) > 0, "attention must name at least one of " + ", ".join(ATTENTION)
        yield (
            len(set(self.attention)) == len(self.attention),
            f"attention lists a name twice: {self.attention}",
        )
        for name in self.attention:
            near = difflib.get_close_matches(str(name), ATTENTION, 3, 0.1) or list(ATTENTION)
            yield (
                self.from_scratch or name not in NO_IDENTITY,
                f"{name} has no identity start, so it cannot be attached to a trained network: leave it "
                "out, or set from_scratch (without pretrained)",
            )
            hint = f"nearest: {', '.join(near)}"
            if self.data is None and Path(str(name)).exists():
                hint = "if it is the folder of images, it goes before --attention"
            yield name in ATTENTION, f"unknown attention {name!r}; {hint}"
        for name in ("data", "model", "pretrained"):
            value = getattr(self, name)
            yield (
                value is None or (isinstance(value, str) and value != ""),
                f"{name} must be a non-empty string, got {value!r}",
            )
        yield (
            "+" not in str(self.model),
            (f"model must be the plain network, got {self.model!r}; name what is compared in attention"),
        )
        yield not (self.from_scratch and self.pretrained), "from_scratch and pretrained exclude each other"
        yield (
            self.data is not None or self.size is None,
            "size applies to image folders only, and no DATA is given",
        )

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return [item.name for item in fields(cls)]
