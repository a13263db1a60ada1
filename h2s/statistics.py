"""Numbers that can mislead, with their intervals: rows of one conversation are never taken for independent."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm

Z = float(norm.ppf(0.975))


def mean_interval(
    values: Sequence[float], clusters: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """A mean with its 95% percentile-bootstrap interval, resampled by conversation.

    Whole conversations are drawn (Field and Welsh 2007).

    Returns:
        mean, lower and upper end. With a single conversation the interval is the mean itself: it says nothing.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=float), "cluster": list(clusters)})
    grouped = frame.groupby("cluster")["value"].agg(["sum", "count"])
    sums, counts = grouped["sum"].to_numpy(), grouped["count"].to_numpy()
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return float(frame["value"].mean()), float(low), float(high)


def share_interval(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, float]:
    """A share (a mean of values in [0, 1], such as right and wrong) with its 95% Wilson interval.

    Wilson 1927 with the effective sample size of a cluster sample, p (1 - p) / Var(p), Var(p) by linearisation (Dean
    and Pagano 2015, doi 10.1093/jssam/smv024). It lies between the number of conversations and that of rows; where all
    values are equal it is the number of conversations, so that all right of 33 does not read as certain.

    Returns:
        share, lower and upper end.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=float), "cluster": list(clusters)})
    rows, share = len(frame), float(frame["value"].mean())
    errors = (frame["value"] - share).groupby(frame["cluster"]).sum()
    count = len(errors)
    size = float(count)
    variance = float((errors**2).sum()) / rows**2 * (count / (count - 1)) if count > 1 else 0.0
    if variance > 0:
        size = min(max(share * (1 - share) / variance, count), rows)
    centre = (share + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(share * (1 - share) / size + Z**2 / (4 * size**2))
    # Exactly 0 and 1 at the edges, where rounding would leave the share outside.
    return share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def share_text(values: Sequence[float], clusters: Sequence[str]) -> str:
    """`share [low, high], n=rows (conversations)` for a log or a table."""
    share, low, high = share_interval(values, clusters)
    return f"{share:.3f} [{low:.3f}, {high:.3f}], n={len(values)} ({len(set(clusters))} conversations)"


def difference_text(values: Sequence[float], clusters: Sequence[str]) -> str:
    """`+mean [+low, +high]` of paired differences."""
    mean, low, high = mean_interval(values, clusters)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test; ties are left out. 1 where there is neither win nor loss."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def adjusted_interval(
    values: Sequence[float],
    covariate: Sequence[float],
    clusters: Sequence[str],
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float, float]:
    """What is left of a mean difference at a covariate of 0: the intercept of values = a + b covariate (ANCOVA).

    Values and covariate are paired differences, so a is the difference between replies of equal length. Interval: 95%
    percentile bootstrap over conversations. Where the covariate does not vary, b is 0.

    Returns:
        a, its lower and upper end, and b.
    """
    x, y = np.asarray(covariate, dtype=float), np.asarray(values, dtype=float)
    frame = pd.DataFrame({"n": 1.0, "x": x, "y": y, "xx": x * x, "xy": x * y, "cluster": list(clusters)})
    sums = frame.groupby("cluster").sum().to_numpy()  # (conversations, 5)
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    intercepts, _ = _line(sums[draws].sum(1))
    low, high = np.percentile(intercepts, [2.5, 97.5])
    intercept, slope = _line(sums.sum(0, keepdims=True))
    return float(intercept[0]), float(low), float(high), float(slope[0])


def _line(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares from the sums of 1, x, y, xx and xy: (N, 5) -> intercepts (N,), slopes (N,)."""
    n, x, y, xx, xy = sums.T
    spread = xx - x * x / n
    slope = np.divide(xy - x * y / n, spread, out=np.zeros_like(n), where=spread > 1e-9 * np.maximum(xx, 1e-300))
    return (y - slope * x) / n, slope
