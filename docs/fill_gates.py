"""Draw the figures of docs/gates.md and insert the measurements: `python -m docs.fill_gates`.

Needs scikit-image, for its photographs, and the results in results/look.
"""

import importlib.resources
import json
import shutil
from pathlib import Path

from cbam.data import decode
from cbam.explain import default_viewer, look, look_figure, stages_figure
from cbam.explain.pair import gates_record
from docs.markers import between

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES, PAGE = ROOT / "results" / "look", ROOT / "docs" / "img", ROOT / "docs" / "gates.md"
PICTURES = {"cat": "chelsea.png", "cup": "coffee.png", "rocket": "rocket.jpg", "astronaut": "astronaut.png"}
MEASURES = {  # key -> words, factor, digits
    "pointing": ("pointing game, %", 100, 1),
    "energy": ("energy in the box, %", 100, 1),
    "iou": ("IoU, %", 100, 1),
    "deletion": ("deletion area, lower is better", 1, 3),
    "insertion": ("insertion area", 1, 3),
}


def draw() -> None:
    """Draw the figures of the photographs, and copy that of the gates."""
    viewer, looks = default_viewer(), []
    for name, file in PICTURES.items():
        data = importlib.resources.files("skimage").joinpath("data", file).read_bytes()
        looks.append(look(viewer, decode(data), name))
    look_figure(looks, IMAGES / "look.png")
    stages_figure(looks[0], IMAGES / "stages.png")
    shutil.copyfile(RESULTS / "gates" / "gates.png", IMAGES / "gates.png")


def pair() -> str:
    """Describe the default pair from the record of its gates."""
    record = gates_record()
    pictures, gates = record["pictures"], record["gates"]
    lines = [
        f"The default network is EfficientNet-Lite0 with the frozen weights of `{record['base']['file']}`. ",
        f"Its copy with CBAM has {gates['parameters']} more parameters, trained from the identity start on ",
        f"one CPU thread, on {pictures['train']} training images of Imagenette ({len(record['classes'])} of ",
        f"ImageNet's classes) at 96 pixels (`{record['command']}`). ",
        f"On {pictures['val']} of its validation images:",
    ]
    table = [
        "| input size, px | classes to choose from | top-1 accuracy, plain, % | with CBAM, % "
        "| difference, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for size, found in record["validation"].items():
        for key, one in found.items():
            if key.startswith("top1"):
                span = f"{one['difference']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
                of = key.removeprefix("top1_of_")
                table.append(f"| {size} | {of} classes | {one['plain']:.2f} | {one['cbam']:.2f} | {span} |")
    note = (
        "These are small, enlarged images of the classes that the gates were trained on. The numbers say "
        "nothing about other classes, sharp photographs, or a network that was trained with attention from "
        "the start. The pair is there as an example to look at."
    )
    return "\n".join(["".join(lines), "", *table, "", note])


def scores() -> str:
    """The table of every result in results/look."""
    return "\n\n".join(_scores(file) for file in sorted(RESULTS.glob("*/score.json")))


def _scores(file: Path) -> str:
    found = json.loads(file.read_text("utf-8"))
    names, against = list(found["scores"]), next(iter(found["differences"]))
    share, page = 100 * found["object_share"], f"../results/look/{file.parent.name}/score.md"
    lines = [
        f"**{found['what']}**: {found['pictures']} images, of which the object covers {share:.0f} % on "
        f"average ([all measurements]({page})).",
        "",
        f"|  | {' | '.join(names)} | {against} |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for key, (words, factor, digits) in MEASURES.items():
        one = found["differences"][against][key]
        difference = f"{factor * one['mean']:+.{digits}f}"
        if one["low"] is not None:
            difference += f" ({factor * one['low']:+.{digits}f} to {factor * one['high']:+.{digits}f})"
        cells = [f"{factor * found['scores'][name][key]:.{digits}f}" for name in names]
        lines.append(f"| {words} | {' | '.join(cells)} | {difference}, {one['word']} |")
    return "\n".join(lines)


def fill(text: str, name: str, shown: str) -> str:
    """`text` with the part between the markers of `name` replaced."""
    return between(text, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", shown)


if __name__ == "__main__":
    draw()
    text = PAGE.read_text("utf-8")
    PAGE.write_text(fill(fill(text, "pair", pair()), "score", scores()), encoding="utf-8")
