"""Sphinx configuration of the site, which `make docs` builds into build/site/ from the repository's pages.

The whole checkout is the source folder, so that links to ../results/ or ../CONTRIBUTING.md work on the site
as in the repository. Neither building nor reading the site needs the network.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes  # pyright: ignore[reportMissingImports]
from docutils.statemachine import StringList  # pyright: ignore[reportMissingImports]
from sphinx.application import Sphinx  # pyright: ignore[reportMissingImports]
from sphinx.util.docutils import SphinxDirective  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cbam  # noqa: E402
from cbam.app import cli  # noqa: E402

os.environ["COLUMNS"] = "84"  # width of the commands' help

project, author, version = "cbam", "the cbam authors", cbam.__version__
release, project_copyright = version, "the cbam authors, MIT licence"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/**/*.md", "results/**/*.md", "native/README.md", "tests/*.md", "*.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "demo-report*", "cbam-runs", "shared"]
suppress_warnings = ["toc.not_included"]  # results/ is linked from the evidence, not from the contents

myst_heading_anchors = 4
highlight_language = "text"
default_role = "code"
add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"cbam {version}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/front"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#b34700", "color-brand-content": "#b34700"},
    "dark_css_variables": {"color-brand-primary": "#ff9d5c", "color-brand-content": "#ff9d5c"},
}
pygments_style, pygments_dark_style = "friendly", "github-dark"


class Room(SphinxDirective):
    """```{room} cbam.nn```: document the public names of a room from their docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = importlib.import_module(self.arguments[0])
        lines = [line for name in room.__all__ for line in _entry(room, name)]
        found = nodes.Element()
        fenced = StringList(["```{eval-rst}", *lines, "```"], source=self.arguments[0])
        self.state.nested_parse(fenced, self.content_offset, found)
        return found.children


def _entry(room: Any, name: str) -> list[str]:
    """The directive that documents one public name."""
    value = getattr(room, name)
    if inspect.ismodule(value):
        return []
    if inspect.isclass(value):
        return [f".. autoclass:: {room.__name__}.{name}", "   :members:", "   :show-inheritance:", ""]
    if callable(value):
        return [f".. autofunction:: {room.__name__}.{name}", ""]
    text = ", ".join(f"`{key}`" for key in value) if isinstance(value, dict) else f"`{value!r}`"
    return [f".. py:data:: {room.__name__}.{name}", "", f"   {text}", ""]


def _formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the line breaks of formulas, which docstrings indent."""
    kept: list[str] = []
    above = ""  # the last line that is not empty
    for line in lines:
        begins = line.startswith("    ") and kept and not kept[-1] and re.match(r"\S", above)
        if begins:
            kept += [".. code-block:: text", ""]
        kept.append(line)
        above = line or above
    lines[:] = kept


def _commands(app: Sphinx, page: str, source: list[str]) -> None:
    """Insert the help of every command into the page of commands."""
    if page != "docs/commands":
        return
    commands = [f"## cbam {name}\n\n```text\n{_help([name, '--help'])}\n```\n" for name in cli.COMMANDS]
    shown = "\n".join([f"```text\n{_help(['--help'])}\n```\n", *commands])
    source[0] = source[0].replace("<!-- commands -->", shown)


def _help(argv: list[str]) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.parse(argv)
    return text.getvalue().strip()


def setup(app: Sphinx) -> None:
    """Register the extensions; called by Sphinx."""
    app.add_directive("room", Room)
    app.connect("source-read", _commands)
    app.connect("autodoc-process-docstring", _formulas, priority=100)  # before napoleon's
