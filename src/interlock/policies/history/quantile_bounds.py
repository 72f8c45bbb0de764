"""Distribution-free confidence bounds on a percentile, from order statistics.

The k-th smallest of n independent values lies at or above their p-th percentile with the probability that at most
k - 1 of them lie below it, which is binomial. (H. A. David, H. N. Nagaraja, Order Statistics, section 7.1.)
"""

from __future__ import annotations

import math
from typing import Final

_SPREAD: Final = 9
"""Standard deviations beyond which the weight of a binomial is below rounding."""


def rank_of_bound(count: int, share: float, confidence: float) -> int | None:
    """Return the smallest k such that the k-th smallest of `count` values bounds a percentile from above.

    `share` is the percentile and `confidence` the required probability, both between 0 and 1. None if not even the
    greatest value is such a bound: `values_needed` returns how many values that takes.
    """
    if count < 1:
        return None
    mean, deviation = count * share, math.sqrt(count * share * (1 - share))
    rank = min(count, math.ceil(mean + _SPREAD * deviation) + 20)
    weight = _binomial(count, share, rank)
    # The probability that `rank` or more lie below the percentile, so that the bound fails.
    above = weight
    if above > 1 - confidence:
        return None
    while rank > 1:
        weight *= rank * (1 - share) / ((count - rank + 1) * share)
        if above + weight > 1 - confidence:
            break
        above += weight
        rank -= 1
    return rank


def values_needed(share: float, confidence: float) -> int:
    """Return how many values it takes until the greatest bounds the percentile with the confidence."""
    return max(1, math.ceil(round(math.log(1 - confidence) / math.log(share), 9)))


def rank_of_percentile(count: int, share: float) -> int:
    """Return the nearest rank of the percentile among `count` ordered values, from 1."""
    return max(1, math.ceil(round(count * share, 9)))


def _binomial(count: int, share: float, successes: int) -> float:
    logarithm = (
        math.lgamma(count + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(count - successes + 1)
        + successes * math.log(share)
        + (count - successes) * math.log1p(-share)
    )
    return math.exp(logarithm)
