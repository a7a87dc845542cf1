import statistics

import numpy as np
import pytest
from scipy import stats

from cbam.studies.statistics import (
    median_ratio,
    paired_difference,
    pairs_needed,
    resolution,
    spread,
    student_quantile,
)


def test_the_interval_is_students_t_over_the_paired_differences():
    cbam, plain = [8.0, 10.1, 8.9, 7.7], [10.0, 12.0, 11.0, 9.1]
    found = paired_difference(cbam, plain, lower_is_better=True)
    interval = stats.ttest_rel(cbam, plain).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["mean"] == pytest.approx(statistics.fmean(cbam) - statistics.fmean(plain))
    assert found["n"] == 4


def test_the_interval_of_two_runs_is_as_computed_by_hand():
    # Differences 1 and 3: mean 2, s = sqrt(2), s / sqrt(2) = 1, t(0.975, 1) = 12.706
    found = paired_difference([2.0, 5.0], [1.0, 2.0], lower_is_better=True)
    assert found["low"] == pytest.approx(2 - 12.706, abs=1e-3)
    assert found["high"] == pytest.approx(2 + 12.706, abs=1e-3)
    assert found["word"] == "no difference shown"


def test_students_quantile_agrees_with_printed_tables():
    assert [student_quantile(n) for n in (1, 2, 4, 9)] == pytest.approx(
        [12.706, 4.303, 2.776, 2.262], abs=1e-3
    )


@pytest.mark.parametrize(
    ("values", "lower_is_better", "word"),
    [
        ([8.0, 10.1, 8.9], True, "better"),
        ([8.0, 10.1, 8.9], False, "worse"),
        ([12.0, 14.1, 12.9], True, "worse"),
        ([12.0, 14.1, 12.9], False, "better"),
        ([9.0, 13.0, 11.1], True, "no difference shown"),
    ],
)
def test_the_word_follows_from_the_interval_and_the_direction(values, lower_is_better, word):
    assert paired_difference(values, [10.0, 12.0, 11.0], lower_is_better=lower_is_better)["word"] == word


def test_one_run_has_no_interval_and_no_verdict():
    found = paired_difference([5.0], [10.0], lower_is_better=True)
    assert (found["mean"], found["low"], found["high"], found["word"]) == (-5, None, None, "not known")
    assert spread([5.0]) is None


def test_equal_differences_have_no_interval():
    found = paired_difference([9.0, 11.0, 10.0], [10.0, 12.0, 11.0], lower_is_better=True)
    assert (found["low"], found["word"]) == (None, "no difference shown")
    same = paired_difference([9.0, 11.0], [9.0, 11.0], lower_is_better=True)
    assert (same["mean"], same["word"]) == (0, "no difference shown")


def test_unpaired_runs_are_an_error():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        paired_difference([1.0], [1.0, 2.0], lower_is_better=True)


def test_a_time_ratio_is_taken_per_round_so_a_slowing_machine_cancels():
    found = median_ratio([2.0, 4.0, 6.0, 2.0, 2.0], [1.0, 1.0, 2.0, 1.0, 1.0])
    assert (found["low"], found["ratio"], found["high"]) == (2.0, 2.0, 3.5)
    assert median_ratio([3.0], [2.0]) == {"ratio": 1.5, "low": 1.5, "high": 1.5}
    slowing = [1.0, 2.0, 4.0, 8.0]
    assert median_ratio([2 * seconds for seconds in slowing], slowing)["ratio"] == 2


def test_what_n_pairs_resolve_is_shown_in_four_of_five_draws():
    random = np.random.default_rng(0)
    size, shown = resolution(1.0, 8), 0
    draws = random.normal(size, 1.0, (4000, 8))
    for values in draws:
        word = paired_difference(values.tolist(), [0.0] * 8, lower_is_better=False)["word"]
        shown += word == "better"
    assert shown / len(draws) == pytest.approx(0.8, abs=0.03)


def test_the_pairs_needed_are_the_fewest_that_resolve_the_difference():
    needed = pairs_needed(-0.7, 1.0)
    assert needed is not None
    assert resolution(1.0, needed) <= 0.7 < resolution(1.0, needed - 1)
    assert pairs_needed(0.001, 1.0) is None
    assert pairs_needed(0.0, 1.0) is None
