"""The named recipes, and the settings given to a run (rows C2, C3, C6, R13)."""

import dataclasses

import pytest

from cbam.errors import ConfigError
from cbam.train import RECIPES, Config, Recipe
from cbam.train.recipes import changes, fine_tuning_rate, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_frozen_documented_config_with_its_name(name):
    config = recipe(name)
    assert config.recipe == name
    assert RECIPES[name].__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1  # type: ignore[misc]


def test_the_paper_recipe_has_the_settings_of_the_paper():
    config = recipe("imagenet/paper")
    assert config.training() == Recipe(
        epochs=90, batch_size=256, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="step",
        step_epochs=30,
    )  # fmt: skip
    assert (config.model, config.size) == ("resnet50+cbam", 224)


def test_the_modern_recipe_has_newer_techniques():
    config = recipe("imagenet/modern")
    assert (config.schedule, config.precision, config.compile) == ("cosine", "bf16", True)
    assert min(config.warmup_epochs, config.label_smoothing, config.mixup, config.cutmix, config.ema) > 0


def test_fine_tuning_trains_the_gates_faster_than_the_network():
    config = recipe("imagenet/finetune")
    assert config.attention_lr > 1
    assert config.lr < recipe("imagenet/paper").lr


def test_pretrained_weights_lower_the_learning_rate_of_a_recipe_to_a_tenth():
    given = {"pretrained": "w.pt"}
    rates = {name: fine_tuning_rate(name, given) for name in RECIPES}
    assert rates["folder"] == rates["digits"] == 0.005
    assert rates["imagenette"] == 0.01
    assert rates["imagenet/finetune"] is rates["detect/short"] is None  # made for it; new layers to train
    assert fine_tuning_rate("folder", {}) is None
    assert fine_tuning_rate("folder", {**given, "lr": 0.05}) is None


def test_attention_starts_as_in_the_paper_or_as_identity_in_a_pretrained_network():
    assert recipe("imagenet/paper").settled().start == "paper"
    assert dataclasses.replace(recipe("folder"), pretrained="w.pt").settled().start == "identity"
    assert Config("digits", start="identity").settled().start == "identity"
    assert Config("digits", model="resnet_tiny").settled().start is None


@pytest.mark.parametrize(
    ("wrong", "right"), [("digit", "digits"), ("imagenet/papers", "imagenet/paper"), ("", "")]
)
def test_a_misspelt_recipe_is_answered_with_the_nearest_name(wrong, right):
    # C6
    with pytest.raises(ConfigError, match=f"unknown recipe '{wrong}'; did you mean '{right}"):
        recipe(wrong)


def test_all_problems_of_a_config_are_reported_together():
    # C3
    with pytest.raises(ConfigError) as caught:
        Config(
            "digits",
            data="x",
            size=-1,
            keep=0,
            seed=-1,
            workers=True,
            lr=-1,
            device="gpu",
            model="",
            epochs=0,
        )
    told = str(caught.value)
    assert "makes its own images" in told
    for name in ("size", "keep", "seed", "workers", "lr", "device", "model", "epochs"):
        assert f"{name} must" in told


def test_settings_that_change_the_result_are_refused_and_others_allowed():
    # R13
    before = dataclasses.asdict(recipe("imagenette"))
    now = {**before, "lr": 0.2, "seed": 3, "device": "cpu", "data": "elsewhere", "devices": 2}
    refused, free = changes(before, now)
    assert refused == ["lr 0.1 -> 0.2", "seed 0 -> 3"]
    assert free == ["data None -> 'elsewhere'", "device 'auto' -> 'cpu'", "devices 1 -> 2"]
    refused, free = changes(before, now, override=True)
    assert refused == ["seed 0 -> 3"]
    assert free[1] == "lr 0.1 -> 0.2"
