"""The documentation site: every page is in its contents, and the built site does not use the network.

`make check` builds it with warnings as errors.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTHS = {"desktop": 1280, "phone": 390}


def contents(page: Path) -> set[Path]:
    """The pages that the contents of `page` list, with those that theirs list."""
    found: set[Path] = set()
    for listed in TOCTREE.findall(page.read_text("utf-8")):
        for line in listed.splitlines():
            if line and not line.startswith(":"):
                child = (page.parent / f"{line}.md").resolve()
                assert child.is_file(), f"{page}: {line} is listed and not there"
                found |= {child} | contents(child)
    return found


def test_every_page_is_in_the_contents_of_the_site():
    cards = {
        path for path in (DOCS / "methods").glob("*.md") if path.stem != "README"
    }  # their README lists them
    pages = set(DOCS.rglob("*.md")) - cards - {DOCS / "index.md"}
    assert pages <= contents(DOCS / "index.md")


def test_links_between_pages_stay_on_the_site():
    """Otherwise reported only by the Sphinx build, which reads no page outside its patterns."""
    (patterns,) = re.findall(
        r"^include_patterns = (\[.*\])$", (DOCS / "conf.py").read_text("utf-8"), re.MULTILINE
    )
    of_site = {path for pattern in ast.literal_eval(patterns) for path in ROOT.glob(pattern)}
    read = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    linked = {
        (page.parent / target).resolve()
        for page in read
        for target in re.findall(r"\]\(([\w./-]+\.md)[)#]", page.read_text("utf-8"))
    }
    assert len(linked) > 30
    assert linked <= of_site


def test_a_listed_page_that_is_missing_is_found(tmp_path):
    (tmp_path / "index.md").write_text("```{toctree}\n:hidden:\n\ngone\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="gone is listed"):
        contents(tmp_path / "index.md")


def test_every_room_has_a_reference_page():
    rooms = {path.parent.name for path in (ROOT / "cbam").glob("*/__init__.py")} - {"app"} | {"errors"}
    assert {path.stem for path in (DOCS / "api").glob("*.md")} == rooms | {"README"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("furo") is None:
        pytest.skip("sphinx and furo are not installed: pip install 'cbam[docs]'")
    folder = tmp_path_factory.mktemp("site")
    line = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-c",
        "docs",
        "-d",
        folder / "trees",
        ".",
    ]
    done = subprocess.run([*line, folder / "html"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.large
def test_the_reference_has_every_public_name(site):
    import cbam

    text = "".join(path.read_text("utf-8") for path in (site / "docs" / "api").glob("*.html"))
    for room in {path.stem for path in (DOCS / "api").glob("*.md")} - {"README", "errors"}:
        for name in getattr(cbam, room).__all__:
            assert f'id="cbam.{room}.{name}"' in text, name


@pytest.mark.large
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_uses_the_network_overflows_or_lacks_an_image(site, browser, width):
    asked, errors, faults = [], [], []
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 900})
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or asked.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    pages = sorted(set(site.rglob("*.html")) - {site / "index.html"})
    assert len(pages) > 30
    for path in pages:
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            faults.append(f"{path} is wider than the window")
        faults += page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
    page.close()
    assert asked + errors + faults == []


@pytest.mark.large
def test_the_search_finds_a_function_and_a_word(site, browser):
    page = browser.new_page()
    for query, title in (
        ("convert_state_dict", "cbam.surgery.convert_state_dict"),
        ("U-Net", "Where do I put it?"),
    ):
        page.goto((site / "search.html").as_uri() + f"?q={query}")
        page.wait_for_selector("#search-results li a", timeout=20_000)
        page.wait_for_function("words => document.body.innerText.includes(words)", arg=title, timeout=20_000)
    page.close()
