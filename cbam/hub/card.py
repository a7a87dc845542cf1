"""The description of a trained network: the configuration that rebuilds it, and the model card."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbam.errors import CheckpointError, InputError

LIBRARY = "cbam"
FORMAT = (
    3  # of config.json; newer ones are rejected. Cards of format 1 lack `resize`, those of format 2 `exif`
)
LARGEST = 4_000_000  # bytes accepted for a config.json
CBAM = "Attention: CBAM (Woo, Park, Lee and Kweon, ECCV 2018, arXiv 1807.06521)."
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Card:
    """What people need to know to use and judge a network; the model card marks what is not given.

    Attributes:
        classes: the name of each output.
        size: side of the images that it was trained on, in pixels.
        resize: length of the shorter side, in pixels, to which images are resized before the centre crop of
            `size` pixels; None: not given.
        mean, std: normalisation per channel, for values in [0, 1].
        exif: whether images are rotated according to their EXIF tag.
        data: what it was trained on.
        pictures: what identifies those images, as `cbam train` records it: counts, digest of names.
        recipe: how it was trained: a name, or settings by name.
        results: measured numbers by name, such as `{"top-1 error, %": 7.4}`.
        licence: of the weights, as an SPDX identifier such as "mit".
        about: anything else, in Markdown.
    """

    classes: tuple[str, ...] = ()
    size: int = 224
    resize: int | None = None
    mean: tuple[float, ...] = _IMAGENET["mean"]
    std: tuple[float, ...] = _IMAGENET["std"]
    exif: bool = True
    data: str = ""
    pictures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str | Mapping[str, Any] = ""
    results: Mapping[str, float] = dataclasses.field(default_factory=dict)
    licence: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        for name, fits in _FITS.items():
            if not fits(getattr(self, name)):
                raise InputError(f"Card({name}=...): got {getattr(self, name)!r:.80}")
        if len(self.mean) != len(self.std):
            raise InputError(
                f"Card(mean=..., std=...): {len(self.mean)} means for {len(self.std)} deviations"
            )
        if self.resize is not None and self.resize < self.size:
            raise InputError(f"Card(resize=...): {self.resize} is less than the size, {self.size}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(_is_number(number) for number in value)


def _is_number(value: Any) -> bool:
    """Whether `value` is finite and fits a float; integers in JSON are unbounded."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 100_000


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FITS = {
    "classes": _is_texts,
    "size": _is_side,
    "resize": lambda value: value is None or _is_side(value),
    "mean": _is_numbers,
    "std": lambda value: _is_numbers(value) and all(value),
    "exif": lambda value: isinstance(value, bool),
    "data": _is_text,
    "pictures": lambda value: isinstance(value, Mapping),
    "recipe": lambda value: isinstance(value, str | Mapping),
    "results": lambda value: isinstance(value, Mapping) and all(map(_is_number, value.values())),
    "licence": _is_text,
    "about": _is_text,
}


@dataclass(frozen=True)
class Network:
    """What rebuilds a network, and what identifies its weights.

    Attributes:
        name: for `cbam.build`, or empty for a network of the user's own.
        outputs: number of classes.
        dtype: of its weights, such as "float32".
        sha256: of the weights file.
        parameters, gmac: number of parameters, and 10^9 multiply-accumulates per image, if known.
    """

    name: str
    outputs: int
    dtype: str
    sha256: str
    parameters: int
    gmac: float | None


def config(network: Network, card: Card) -> str:
    """The text of config.json.

    Raises:
        InputError: the card holds something that JSON cannot express.
    """
    content = {"library_name": LIBRARY, "format": FORMAT, **dataclasses.asdict(network)}
    try:
        return json.dumps(content | {"card": dataclasses.asdict(card)}, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the card cannot be written as JSON: {error}") from error


def read_config(path: Path) -> tuple[Network, Card]:
    """Read a config.json, and check every field.

    Raises:
        CheckpointError: not written by cbam, damaged, or of a newer version.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: larger than {LARGEST} bytes, the limit for a config.json")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("library_name") != LIBRARY:
        raise CheckpointError(f"{path}: not written by cbam.save_pretrained")
    if type(content.get("format")) is not int or content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written by a newer cbam (format {content.get('format')!r:.20}, known up to {FORMAT}); "
            "upgrade cbam"
        )
    try:
        network, card = _network(content), _card(content.get("card"))
        if card.classes and len(card.classes) != network.outputs:
            raise ValueError(f"it names {len(card.classes)} classes, but has {network.outputs} outputs")
        return network, card
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _network(content: dict[str, Any]) -> Network:
    kinds = {"name": str, "outputs": int, "dtype": str, "sha256": str, "parameters": int}
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:
            raise ValueError(f"{name} is {content.get(name)!r:.40}")
    gmac = content.get("gmac")
    if gmac is not None and not _is_number(gmac):
        raise ValueError(f"gmac is {gmac!r:.40}")
    return Network(**{name: content[name] for name in kinds}, gmac=gmac)


def _card(content: Any) -> Card:
    if not isinstance(content, dict):
        raise ValueError("the card is missing")
    known = {field.name for field in dataclasses.fields(Card)}
    if unknown := content.keys() - known:
        raise ValueError(f"the card has unknown fields: {', '.join(sorted(map(str, unknown)))[:80]}")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    return Card(**fields)


def page(network: Network, card: Card, title: str) -> str:
    """The model card: Markdown, with the header that the Hugging Face Hub reads."""
    name = network.name or "a custom network"
    loaded = "" if network.name else ", model=your_network"
    costs = f"- parameters: {network.parameters:,}"
    if network.gmac is not None:
        costs += f"\n- multiply-accumulates for one image of {card.size} px: {network.gmac:.4f} G"
    parts = [
        _header(card, title),
        f"# {_line(title)}",
        f"{_line(name)}, {network.outputs} classes, weights in {network.dtype}.",
        card.about,
        f"```python\nimport cbam\n\nmodel = cbam.from_pretrained({json.dumps(title)}{loaded})"
        "  # this folder, or org/name on the Hub\n```",
        f"Images are RGB{_sides(card)}, scaled to [0, 1] and normalised with mean {_numbers(card.mean)} "
        f"and standard deviation {_numbers(card.std)}.",
        "## What it costs",
        costs,
        "## How it was trained",
        f"- data: {_line(card.data) or 'not given'}\n- recipe: {_recipe(card.recipe)}",
        "## Results",
        _results(card.results),
        "## Licence",
        _line(card.licence) or "Not given: ask the author before using the weights.",
        CBAM if "+cbam" in network.name else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sides(card: Card) -> str:
    square = f"{card.size} x {card.size} px"
    if card.resize is None:
        return f" of {square}"
    return f", resized to {card.resize} px on the shorter side and centre-cropped to {square}"


def _header(card: Card, title: str) -> str:
    """YAML with every value written as JSON, which is valid YAML, so that no text can break out of it."""
    header: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-classification",
        "tags": ["cbam", "attention", "pytorch"],
    }
    if card.licence:
        header["license"] = card.licence
    if card.results and card.data:
        metrics = [{"type": name, "name": name, "value": value} for name, value in card.results.items()]
        task = {"type": "image-classification"}
        result = {"task": task, "dataset": {"name": card.data, "type": card.data}, "metrics": metrics}
        header["model-index"] = [{"name": title, "results": [result]}]
    lines = [f"{name}: {json.dumps(value)}" for name, value in header.items()]
    return "\n".join(["---", *lines, "---"])


def _recipe(recipe: str | Mapping[str, Any]) -> str:
    if isinstance(recipe, str):
        return _line(recipe) or "not given"
    return (
        ", ".join(f"{_line(str(name))} {_line(str(value))}" for name, value in recipe.items()) or "not given"
    )


def _results(results: Mapping[str, float]) -> str:
    if not results:
        return "Not given."
    rows = [f"| {_line(name)} | {value:g} |" for name, value in results.items()]
    return "\n".join(["| measured | value |", "| --- | --- |", *rows])


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _line(text: str) -> str:
    """The text as one line that cannot end a table cell or start HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
