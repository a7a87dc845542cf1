import math

import pytest

from cbam.errors import ConfigError
from cbam.train import Recipe


def test_the_cosine_schedule_falls_from_one_to_zero_over_the_run():
    recipe = Recipe(epochs=4)
    factors = [recipe.lr_factor(step, 10) for step in range(41)]
    assert factors[0] == 1
    assert factors[20] == pytest.approx(0.5)
    assert factors[40] == pytest.approx(0, abs=1e-15)
    assert factors == sorted(factors, reverse=True)
    assert factors[10] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_the_papers_schedule_divides_by_ten_every_thirty_epochs():
    recipe = Recipe(epochs=90, schedule="step")
    assert [recipe.lr_factor(epoch * 7, 7) for epoch in (0, 29, 30, 59, 60, 89)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_a_constant_schedule_is_constant():
    assert {Recipe(schedule="constant").lr_factor(step, 3) for step in range(100)} == {1.0}


def test_all_problems_of_a_recipe_are_reported_together():
    # C3
    with pytest.raises(ConfigError) as caught:
        Recipe(epochs=0, lr=float("nan"), momentum=1, optimizer="adam", schedule="linear", batch_size=True)
    told = str(caught.value)
    for name in ("epochs", "lr", "momentum", "optimizer", "schedule", "batch_size"):
        assert f"{name} must be" in told


@pytest.mark.parametrize("value", [-1, float("inf"), "0.1", None])
def test_an_invalid_learning_rate_is_refused(value):
    with pytest.raises(ConfigError, match="lr must be a finite number"):
        Recipe(lr=value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"epochs": 3, "warmup_epochs": 5},
            "epochs is 3: warmup_epochs is 5, so the learning rate rises to the end",
        ),
        (
            {"epochs": 10, "schedule": "step"},
            "epochs is 10: the learning rate is not lowered at step_epochs 30",
        ),
        (
            {"epochs": 8, "schedule": "step", "milestones": (4, 8, 9)},
            "epochs is 8: the learning rate is not lowered at milestones 8 9",
        ),
        ({"epochs": 31, "schedule": "step", "warmup_epochs": 30.5}, ""),
        ({"epochs": 3}, ""),
    ],
)
def test_a_schedule_the_epochs_do_not_reach_is_reported_without_an_error(settings, told):
    recipe = Recipe(**settings)
    assert recipe.unreached() == told
    factors = [recipe.lr_factor(step, 10) for step in range(10 * recipe.epochs)]
    assert (factors == sorted(factors) or (4 in recipe.milestones)) == bool(told)
