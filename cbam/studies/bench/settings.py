"""The settings of `cbam bench`. Does not import torch, since the command line builds its help from it."""

from dataclasses import dataclass

from cbam.errors import ConfigError
from cbam.train.option import option

DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark."""

    device: str = option("auto", "auto, cpu or cuda", "NAME")
    dtype: str | None = option(
        None, f"{', '.join(DTYPES)} (default: float32 on a CPU, else bfloat16)", "NAME"
    )
    networks: tuple[str, ...] = option(
        ("resnet18", "resnet50", "mobilenet_v3_large", "convnext_tiny"), "networks to measure", "NAME"
    )
    batch_size: int | None = option(None, "images per step (default: 8 on a CPU, else 128)", "N")
    layouts: tuple[str, ...] = option(("NCHW", "NHWC"), "NCHW, NHWC or both", "NAME")
    compiled: bool = option(False, "also measure whole networks under torch.compile")
    keep_memory: bool = option(
        False, "let the C library keep freed memory: times without page faults (Linux, CPU)"
    )
    rounds: int = option(11, "rounds in which everything is timed, in alternation", "N")
    quick: bool = option(False, "only one shape and one small network, about a minute")

    def __post_init__(self) -> None:
        problems = []
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if set(self.layouts) - set(LAYOUTS) or not self.layouts:
            problems.append(f"layouts must be NCHW, NHWC or both, got {' '.join(self.layouts)}")
        for name in ("batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                problems.append(f"{name} must be a whole number above 0, got {value!r}")
        if problems:
            raise ConfigError("; ".join(problems))
