"""What a few paired runs show, and what they do not."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
POWER = 0.8
MOST_PAIRS = 1000


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired_difference(values: Sequence[float], plain: Sequence[float], *, lower_is_better: bool) -> dict:
    """The mean of `values - plain` over runs paired by seed, with Student's 95 % interval.

    The interval is mean +- t(0.975, n - 1) s / sqrt(n), where s is the standard deviation of the n
    differences. It is None for a single run, and if all differences are equal: errors on a finite
    validation set are counts, so a few equal differences do not prove a spread of zero.

    Returns:
        {"n", "mean", "low", "high", "word"}; the word is "better" or "worse" if the interval excludes
        zero, else "no difference shown", and for a single run "not known".
    """
    differences = [a - b for a, b in zip(values, plain, strict=True)]
    mean, deviation = statistics.fmean(differences), spread(differences)
    if not deviation or deviation < 1e-12:
        word = "no difference shown" if len(differences) > 1 else "not known"
        return {"n": len(differences), "mean": mean, "low": None, "high": None, "word": word}
    half = student_quantile(len(differences) - 1) * deviation / math.sqrt(len(differences))
    low, high = mean - half, mean + half
    if low <= 0 <= high:
        word = "no difference shown"
    else:
        word = "better" if (high < 0) == lower_is_better else "worse"
    return {"n": len(differences), "mean": mean, "low": low, "high": high, "word": word}


def student_quantile(degrees: int, probability: float = 0.5 + CONFIDENCE / 2) -> float:
    """A quantile of Student's t; by default the two-sided 95 % one, 4.303 for two degrees of freedom."""
    from scipy.special import stdtrit  # comes with scikit-learn

    return float(stdtrit(degrees, probability))


def resolution(deviation: float, n: int) -> float:
    """The smallest true difference that n pairs detect with a probability of POWER.

    (t(0.975, n - 1) + t(POWER, n - 1)) s / sqrt(n), the usual approximation; s is the standard deviation of
    the differences.
    """
    degrees = n - 1
    return (student_quantile(degrees) + student_quantile(degrees, POWER)) * deviation / math.sqrt(n)


def pairs_needed(difference: float, deviation: float) -> int | None:
    """The number of pairs whose `resolution` is the size of `difference`; None above MOST_PAIRS."""
    enough = (n for n in range(2, MOST_PAIRS + 1) if resolution(deviation, n) <= abs(difference))
    return next(enough, None)


def median_ratio(values: Sequence[float], plain: Sequence[float]) -> dict:
    """Median and quartiles of the ratios of two series of times, round by round.

    Both were measured in alternation, so what slowed the machine in round i slowed both; the ratio of the
    two medians would not cancel that.
    """
    ratios = sorted(a / b for a, b in zip(values, plain, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "low": low, "high": high}
