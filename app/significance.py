"""Is a difference more than what chance among the questions explains?"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 1
"""So that the same two runs always give the same interval."""
BATCH_SIZE = 100
"""Resamples drawn at once: 8 MB for each thousand questions."""


def interval(*gains: Sequence[float]) -> tuple[float, float]:
    """Give where the mean of the means of paired gains lies with 95% confidence, by a percentile bootstrap.

    Args:
        gains: of each question, what is measured now less what was before; one sequence for each kind of question, of
            two at least.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        [np.asarray(one, dtype=float) for one in gains],
        mean_of_means,
        n_resamples=NUM_RESAMPLES,
        batch=BATCH_SIZE,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_of_means(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Average over the questions of each kind, then over the kinds."""
    means: NDArray[np.float64] = np.mean([sample.mean(axis=axis) for sample in samples], axis=0)
    return means
