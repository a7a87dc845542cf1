"""The cards of docs/methods/ say what the docstrings say and what the networks cost."""

import re
import runpy
from pathlib import Path

import pytest

import cbam
from cbam.nn import ATTENTION

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"
PROGRAM = runpy.run_path(str(ROOT / "docs" / "fill_methods.py"))


def test_the_cards_are_up_to_date():
    pages = PROGRAM["pages"]()
    stale = [name for name, text in pages.items() if (FOLDER / name).read_text("utf-8") != text]
    assert not stale, "run make cards"
    assert {path.name for path in FOLDER.iterdir()} == pages.keys()


@pytest.mark.parametrize("name", ATTENTION)
def test_a_card_has_a_formula_a_reference_and_a_block_that_runs(name):
    text = (FOLDER / f"{name}.md").read_text("utf-8")
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert heads[:6] == ["Arguments", "Shape", "Cost", "Identity start", "Usage", "Reference"]
    assert re.search(r"^```text\n(F|\S+ *=)", text, re.MULTILINE)
    assert re.search(r"arXiv\s\d{4}\.\d{4,5}|PMLR", text)
    assert len(re.findall(r"^```python$", text, re.MULTILINE)) == 1


def test_the_costs_on_a_card_are_those_of_an_attached_network():
    """The program counts one network, exchanging the modules at the places that `attach` found."""
    from cbam.models import build, profile

    for name, start in (("eca", "identity"), ("sk", "paper")):
        model = cbam.attach(build("resnet50"), None, ATTENTION[name], start=start)
        parameters, gmac = profile(model)
        row = f"| ResNet50 with it in its 16 blocks | {parameters:,} | {gmac:.4f} |"
        assert row in (FOLDER / f"{name}.md").read_text("utf-8")
