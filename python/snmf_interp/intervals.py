"""What intervals of means are made of: the bootstrap, and standard errors of tables with two sampled sides."""

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


def mean_error(table: Tensor) -> tuple[float, float]:
    """Standard error of the mean of a table whose rows and columns are both sampled, and its degrees of freedom.

    A value is the mean plus an effect of its row, one of its column, and the rest (crossed random effects). The
    variance of the mean is estimated from the mean squares of the two-way analysis of variance,
    ``(MS_rows + MS_columns - MS_rest) / (m r)``, without bias (Searle, Casella & McCulloch, Variance Components, 1992);
    an effect whose own variance would be estimated below 0 is taken to have none. Degrees of freedom: Satterthwaite
    (1946), so that few columns that differ much widen the interval. This is how readers and cases are both sampled in
    studies of diagnostic accuracy (Dorfman, Berbaum & Metz 1992; Hillis 2007).

    Args:
        table: ``[m, r]``, m at least 2, without NaN. With one column, the standard error over its rows.

    Returns:
        The standard error, and above 0 degrees of freedom.
    """
    table = table.double()
    m, r = table.shape
    rows, columns = table.mean(1), table.mean(0)
    between_rows = float(r * rows.var())
    if r == 1:
        return (between_rows / m) ** 0.5, m - 1
    between_columns = float(m * columns.var())
    crossed = (m - 1) * (r - 1)
    rest = float((table - rows[:, None] - columns + table.mean()).square().sum()) / crossed
    total = between_rows + between_columns - rest
    if total <= between_rows or total <= between_columns:
        # Only one effect, or none, is seen above the rest.
        larger, freedom = max((between_rows, m - 1), (between_columns, r - 1))
        return (larger / (m * r)) ** 0.5, freedom
    spread = between_rows**2 / (m - 1) + between_columns**2 / (r - 1) + rest**2 / crossed
    return (total / (m * r)) ** 0.5, total**2 / spread
