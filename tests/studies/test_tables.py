"""The rows of the studies: the paper's numbers, and networks that can be built."""

import re
from pathlib import Path

import pytest

import cbam
from cbam.nn import ATTENTION
from cbam.studies.study import LARGE_COCO, digits, imagenet, imagenette, run_config, run_key, usual
from cbam.studies.tables import STUDIES
from cbam.studies.training import cost_of

PAPER = Path(cbam.__file__).parents[2] / "shared" / "reference" / "paper.md"


def test_the_studies_are_the_papers_tables_and_further_ones():
    assert list(STUDIES) == [
        "channel", "spatial", "order", "networks", "mobile", "peers", "reduction", "start", "placement",
        "coco", "voc",
    ]  # fmt: skip
    assert all(name == study.name for name, study in STUDIES.items())


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_is_a_distinct_run_compared_with_existing_rows(name):
    study = STUDIES[name]
    configs = [run_key(run_config(digits(), arm, 0)) for arm in study.arms.values()]
    assert len(set(configs)) == len(configs)
    for arm in study.arms.values():
        assert set(arm.against) <= set(study.arms)
    assert any(arm.against for arm in study.arms.values())


@pytest.mark.parametrize("name", ["placement", "reduction", "start"])
def test_every_row_on_the_digits_can_be_built(name):
    for arm in STUDIES[name].arms.values():
        cost = cost_of(run_config(digits(), arm, 0), 10, 64)
        assert (cost["sites"] > 0) == bool(arm.attention)


@pytest.mark.large
@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("protocol", [digits(), imagenette(), imagenet()], ids=lambda p: p.network)
def test_every_row_can_be_built(name, protocol):
    if STUDIES[name].boxed:
        protocol = STUDIES[name].usual("boxes", 300 if protocol.small else LARGE_COCO, 64)
    for arm in STUDIES[name].chosen(small=protocol.small).values():
        cost = cost_of(run_config(protocol, arm, 0), 10, 64)
        assert (cost["sites"] > 0) == bool(arm.attention)


def test_the_peers_are_all_attention_modules():
    assert set(STUDIES["peers"].arms) == {"plain", *ATTENTION}


@pytest.mark.parametrize(
    ("name", "arm", "parameters"),
    [
        ("channel", "avg", 28_088_024),
        ("spatial", "conv3", 28_103_304),
        ("networks", "resnet18+cbam", 11_779_392),
        ("networks", "wide_resnet18_1.5+se", 26_074_716),
        ("mobile", "0.7+cbam", 2_707_361),
        ("mobile", "1.0", 4_231_976),
    ],
)
def test_rows_have_the_papers_number_of_parameters(name, arm, parameters):
    config = run_config(imagenet(), STUDIES[name].arms[arm], 0)
    assert cost_of(config, 1000, 64)["parameters"] == parameters


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's numbers are not next to the checkout")
def test_the_papers_errors_are_those_of_its_tables():
    text = PAPER.read_text("utf-8")
    for number, name in enumerate(("channel", "spatial", "order", "networks", "mobile"), 1):
        block = text.split(f"## Table {number}:")[1].split("## ")[0]
        printed = [
            tuple(map(float, pair)) for pair in re.findall(r"\| (\d\d\.\d\d) \| (\d+\.\d\d) \|", block)
        ]
        assert [arm.paper for arm in STUDIES[name].arms.values()] == printed


def test_the_usual_protocol_follows_the_data():
    assert usual("digits", 1437, 64) == digits()
    flowers = usual("flowers", 9469, 96)
    assert (flowers.network, flowers.data, flowers.resident) == ("resnet18", "flowers", True)
    assert not usual("flowers", 100_000, 224).resident  # 15 GB
    assert usual("imagenet", 1_281_167, 224).schedule == "step"


def test_a_setting_that_is_off_does_not_change_the_key_of_a_run():
    config = run_config(digits(), STUDIES["channel"].arms["plain"], 0)
    assert run_key(config | {"ema": None, "deep": False}) == run_key(config)
    assert run_key(config | {"seed": 1}) != run_key(config)
    assert run_key(config | {"seed": 0}) == run_key(config)
