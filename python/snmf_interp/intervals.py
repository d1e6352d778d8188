"""Bootstrap intervals of means."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def bootstrap_mean(
    values: Tensor, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values [m]``; (NaN, NaN) for fewer than two values."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float("nan"), float("nan")
    found = bootstrap(
        (values.double().numpy(),),
        np.mean,
        confidence_level=confidence,
        n_resamples=n_resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
