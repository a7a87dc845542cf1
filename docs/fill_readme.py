"""Put picture and table of a demo report into README.md: `python docs/fill_readme.py demo-report`.

What stands between the two markers of the README is replaced; the picture is copied to docs/img/demo.png.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
TABLE = re.compile(r"^\|.+\|\n\|[-:| ]+\|\n(?:\|.+\|\n)+", re.MULTILINE)


def fill(report: Path, readme: Path, picture: Path) -> None:
    """Fill the README from the report folder; without table or picture all stays as it is."""
    page = (report / "report.md").read_text("utf-8")
    source = report / "picture.png"
    table = TABLE.search(page)
    if not table or not source.is_file():
        sys.exit(f"{report} holds no table or no picture: run make demo again")
    before, rest = readme.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, picture)
    link = picture.relative_to(readme.parent).as_posix()
    shown = f"![Pictures, what the networks look at, and the maps of the attention]({link})"
    readme.write_text(f"{before}{BEGIN}\n{table[0]}\n{shown}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        fill(Path(sys.argv[1]), ROOT / "README.md", ROOT / "docs" / "img" / "demo.png")
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is not there: run make demo first")
