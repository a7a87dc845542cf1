"""The code of the README and of the pages in docs/ runs, and their links work.

Every ```python block of a page runs, in order, in one namespace and in an empty folder, except under the line
`<!-- no-run: reason -->`, or `<!-- needs: module -->` if that is not installed; a skipped test counts these
and gives the reasons. A block under `<!-- stand-in: name -->` would download; here it gets a substitute.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
import timm
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

FENCE = re.compile(
    r"(?:^<!-- (?:no-run: (?P<reason>.+?)|needs: (?P<needs>\w+)|stand-in: (?P<stand_in>[\w.]+)) -->\n+)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    """A python block of a page; `reason` says why it does not run, `line` is that of its first statement.

    `stand_in` names what takes the place of a download.
    """

    page: Path
    line: int
    code: str
    reason: str | None
    stand_in: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "py"):
            line = text.count("\n", 0, match.start("code")) + 1
            yield Block(
                page, line, match["code"], match["reason"] or _lacking(match["needs"]), match["stand_in"]
            )


def _lacking(module: str | None) -> str | None:
    lacks = module is not None and importlib.util.find_spec(module) is None
    return f"{module} is not installed" if lacks else None


def run(page: Path) -> dict:
    """Run the blocks of a page and return their namespace; a traceback shows the page's own lines."""
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is None:
            with pytest.MonkeyPatch.context() as patch:
                if block.stand_in is not None:
                    STAND_INS[block.stand_in](patch)
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    return namespace


def _hub(patch: pytest.MonkeyPatch) -> None:
    """A repository of the Hub is the local folder of its name, at any revision."""

    def snapshot(repository: str, *, allow_patterns: list[str], revision: str | None) -> str:
        return repository.partition("/")[2]

    patch.setattr(huggingface_hub, "snapshot_download", snapshot)


def _torch_hub(patch: pytest.MonkeyPatch) -> None:
    """The repository is this one; torch.hub reads its hubconf.py."""
    load = torch.hub.load
    patch.setattr(
        torch.hub,
        "load",
        lambda repo, entry, *args, source="github", **kw: load(str(ROOT), entry, *args, source="local", **kw),
    )


def _timm(patch: pytest.MonkeyPatch) -> None:
    """Pretrained weights are replaced by random ones."""
    create = timm.create_model
    patch.setattr(timm, "create_model", lambda name, pretrained, **kw: create(name, **kw))


STAND_INS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "huggingface_hub": _hub,
    "torch.hub": _torch_hub,
    "timm": _timm,
}


def dead_links(page: Path) -> list[str]:
    """file:line of each relative link to a file or a heading that does not exist."""
    text = page.read_text("utf-8")
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    found = []
    for match in LINK.finditer(prose):
        target, _, heading = (match[1] or match[2]).partition("#")
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        aim = page.parent / target if target else page
        if not aim.exists() or (heading and heading not in headings(aim)):
            found.append(f"{page}:{prose.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.reason is None for b in blocks(p))], ids=label)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_a_block_that_does_not_run_compiles_and_gives_a_reason():
    left_out = [block for page in PAGES for block in blocks(page) if block.reason]
    for block in left_out:
        compile(block.code, str(block.page), "exec")
    if left_out:
        reasons = "; ".join(f"{block.page.name}:{block.line}: {block.reason}" for block in left_out)
        pytest.skip(f"{len(left_out)} blocks do not run: {reasons}")


@pytest.mark.parametrize("page", TEXTS, ids=label)
def test_relative_links_work(page):
    assert not dead_links(page)


def test_the_readme_and_the_changelog_are_checked():
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= {page.name for page in TEXTS}
    assert any(block.reason is None for block in blocks(ROOT / "README.md"))


def test_a_failing_block_is_found_and_shares_the_earlier_namespace(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as error:
        run(page)
    assert error.traceback[-1].lineno == 7  # counted from 0: the page's eighth line


def test_a_block_with_a_reason_does_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: needs a GPU -->\n```python\nx = 1\n```\n```sh\nls\n```\n", encoding="utf-8")
    (block,) = blocks(page)
    assert block.reason == "needs a GPU"
    assert "x" not in run(page)


def test_a_stand_in_is_active_only_for_its_block(tmp_path, monkeypatch):
    monkeypatch.setitem(STAND_INS, "a", lambda patch: patch.setattr(math, "tau", 6))
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- stand-in: a -->\n```python\nimport math\nx = math.tau\n```\n```python\ny = math.tau\n```\n",
        encoding="utf-8",
    )
    assert (run(page)["x"], run(page)["y"]) == (6, math.tau)


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, with a comma\n[a](page.md) [b](#a-heading-with-a-comma) [c](https://example.org)\n"
        "[d](gone.md)\n```\n[e](code.md)\n```\n![f](img/gone.png)\n[g](#no-such)\n",
        encoding="utf-8",
    )
    assert [link.split(":")[1] for link in dead_links(page)] == ["3", "7", "8"]
