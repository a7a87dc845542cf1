"""Put a demo report into README.md, image and table: `python -m docs.fill_readme demo-report`.

The text between the two markers of the README is replaced: the verdicts and the image, and, folded, the table
and what was run. The image is copied to docs/img/demo.png.
"""

import json
import shutil
import sys
from pathlib import Path

from docs.markers import between

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def fill(report: Path, readme: Path, picture: Path) -> None:
    """Fill the README from a report folder; that of an incomplete run is refused."""
    if json.loads((report / "results.json").read_text("utf-8"))["status"] != "complete":
        sys.exit(f"{report} is from an incomplete run: run make demo again")
    _, body = (report / "report.md").read_text("utf-8").split("\n", 1)  # the README has its own headline
    body, facts = body.split("\n## What was run\n")
    body = body.replace("](picture.png)", f"]({picture.relative_to(readme.parent).as_posix()})")
    verdicts, rest = body.split("\n|", 1)
    table, seen = rest.split("\n![", 1)
    parts = [
        verdicts.strip(),
        f"![{seen.strip()}",
        _folded("The numbers", f"|{table.rstrip()}"),
        _folded("What was run", facts.strip()),
    ]
    shown = "\n\n".join(parts)
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(report / "picture.png", picture)
    readme.write_text(between(readme.read_text("utf-8"), BEGIN, END, shown), encoding="utf-8")


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


if __name__ == "__main__":
    try:
        fill(Path(sys.argv[1]), ROOT / "README.md", ROOT / "docs" / "img" / "demo.png")
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing: run make demo first")
