"""Numbers that can mislead, with their intervals: rows of one conversation are never taken for independent."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, t


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

    Wilson 1927 with the effective sample size of a cluster sample, p (1 - p) / Var(p), Var(p) by linearisation, and
    Student's t (Dean and Pagano 2015, doi 10.1093/jssam/smv024). The size is at most the number of rows and at least
    Kish's number of conversations, rows^2 / sum of squared conversation sizes: one long conversation is no crowd. It is
    the latter where all values are equal, so that all right of 33 does not read as certain. t has that number less 1
    degrees of freedom, at least 1.

    Returns:
        share, lower and upper end.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=float), "cluster": list(clusters)})
    rows, share = len(frame), float(frame["value"].mean())
    grouped = (frame["value"] - share).groupby(frame["cluster"])
    errors, count = grouped.sum(), grouped.ngroups
    kish = rows**2 / float((grouped.size() ** 2).sum())
    size = kish
    variance = float((errors**2).sum()) / rows**2 * (count / (count - 1)) if count > 1 else 0.0
    if variance > 0:
        size = min(max(share * (1 - share) / variance, kish), rows)
    z = float(t.ppf(0.975, max(kish - 1, 1)))
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    # Exactly 0 and 1 at the edges, where rounding would leave the share outside.
    return share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def share_text(values: Sequence[float], clusters: Sequence[str]) -> str:
    """`share [low, high], n=rows (conversations)` for a log or a table."""
    share, low, high = share_interval(values, clusters)
    return f"{share:.3f} [{low:.3f}, {high:.3f}], n={len(values)} ({len(set(clusters))} conversations)"


def difference_text(values: Sequence[float], clusters: Sequence[str]) -> str:
    """`+mean [+low, +high]` of paired differences; a single conversation has no interval."""
    mean, low, high = mean_interval(values, clusters)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if len(set(clusters)) > 1 else f"{mean:+.3f} (no interval)"


def sign_test(differences: Sequence[float], clusters: Sequence[str]) -> float:
    """p-value of the exact two-sided sign test on each conversation's mean difference; ties are left out.

    1 where all are ties.
    """
    means = pd.Series(np.asarray(differences, dtype=float)).groupby(list(clusters)).mean()
    above, below = int((means > 0).sum()), int((means < 0).sum())
    return float(binomtest(above, above + below).pvalue) if above + below else 1.0


def sign_test_text(differences: Sequence[float], clusters: Sequence[str]) -> str:
    """`exact sign test p = ...`, and over what where that is not the rows."""
    over = " over conversations" if len(set(clusters)) < len(clusters) else ""
    return f"exact sign test{over} p = {sign_test(differences, clusters):.3g}"


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
