"""Numbers that can mislead, with their intervals: rows of one conversation are never taken for independent."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, f, t
from statsmodels.stats.power import TTestPower

from h2s.data.splits import FEWEST_REPORTED


def mean_interval(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, float]:
    """A mean with its 95% cluster-robust interval; rows of equal cluster (conversation) may depend on one another.

    Where every row is a conversation of its own this is the one-sample t interval.

    Returns:
        mean, lower and upper end. With a single conversation the interval is the mean itself: it says nothing.
    """
    return _interval(values, np.ones((len(values), 1)), clusters)[:3]


def between_share(values: np.ndarray, clusters: Sequence) -> tuple[float, float, float]:
    """The share of the variance that lies between rows, with its 95% interval (Shrout and Fleiss 1979, ICC(1,1)).

    The interval takes rows as independent, so of each conversation the first row alone counts.

    Args:
        values: k of each row, (N, k); rows with NaN are left out.
        clusters: the conversation of each row, (N,).

    Returns:
        share, lower and upper end; NaN where N or k is below 2 or nothing varies.
    """
    known = ~np.isnan(values).any(axis=1)
    values = values[known][np.sort(np.unique(np.array(list(clusters))[known], return_index=True)[1])]
    rows, k = values.shape
    if rows < 2 or k < 2 or np.ptp(values) == 0:
        return math.nan, math.nan, math.nan
    between, within = k * values.mean(1).var(ddof=1), values.var(axis=1, ddof=1).mean()
    if within == 0:
        return 1.0, 1.0, 1.0
    ratio, freedom = between / within, (rows - 1, rows * (k - 1))
    ends = [ratio, ratio / f.ppf(0.975, *freedom), ratio * f.ppf(0.975, *freedom[::-1])]
    share, low, high = ((end - 1) / (end + k - 1) for end in ends)
    return float(share), float(low), float(high)


def least_squares(
    values: Sequence[float] | np.ndarray, regressors: np.ndarray, clusters: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Least squares, and an error of the first coefficient that takes conversations, not rows, as independent.

    The error is CR2, the bias-reduced linearisation of Bell and McCaffrey (2002, Survey Methodology 28(2), 169-181),
    Student's t has their Satterthwaite degrees of freedom, both for a working model of independent rows; as recommended
    for few or unlike clusters by Imbens and Kolesar (2016, doi 10.1162/REST_a_00552) and Pustejovsky and Tipton (2018,
    doi 10.1080/07350015.2016.1247004), whose generalised inverse leaves out what one conversation alone determines.
    The usual sandwich with G - 1 degrees covers less where conversations differ in size: 80% instead of 95% where one
    of ten holds half of the rows.

    Args:
        values: (N,), or (N, R) for R samples of the same regressors and conversations.
        regressors: (N, k), linearly independent.
        clusters: the conversation of each row, (N,).

    Returns:
        The coefficients, (k,) or (k, R); the first one's standard error, () or (R,); its degrees of freedom, at least 1
        and at most the number of conversations less 1. The error is 0 where there are no more conversations than
        coefficients: these can then fit every conversation, and leave no error to judge by.
    """
    y = np.asarray(values, dtype=float)
    q, r = np.linalg.qr(regressors)  # regressors = q r, so the coefficients are inverse(r) q' y
    inverse = np.linalg.inv(r)
    fitted = q.T @ y
    names, groups = np.unique(list(clusters), return_inverse=True)
    leverage = np.zeros((len(names), *r.shape))  # q_g' q_g of each conversation g
    np.add.at(leverage, groups, q[:, :, None] * q[:, None, :])
    # (I - q_g q_g')^(-1/2) on the weights of g, which are q_g times the first row of `inverse`: in k dimensions.
    left, directions = np.linalg.eigh(np.eye(r.shape[0]) - leverage)
    root = np.where(left > 1e-9, np.maximum(left, 1e-9) ** -0.5, 0)
    weights = np.einsum("gij,gj,gkj,k->gi", directions, root, directions, inverse[0])  # (G, k)
    own = np.einsum("gi,gij->gj", weights, leverage)
    # The variance is a quadratic form in y; its matrix has the eigenvalues of diag(size) - own own'.
    size = (own * weights).sum(1)
    trace = size.sum() - (own**2).sum()
    square = (size**2).sum() - 2 * (size[:, None] * own**2).sum() + ((own.T @ own) ** 2).sum()
    if len(names) <= r.shape[0] or trace <= 1e-9 * (inverse[0] ** 2).sum():
        return inverse @ fitted, np.zeros(y.shape[1:]), 1.0
    residuals = y - q @ fitted
    scores = np.zeros((len(names), *y.shape[1:]))
    np.add.at(scores, groups, ((q * weights[groups]).sum(1) * residuals.T).T)
    return inverse @ fitted, np.sqrt((scores**2).sum(0)), float(trace**2 / square)


def _interval(
    values: Sequence[float], regressors: np.ndarray, clusters: Sequence[str]
) -> tuple[float, float, float, np.ndarray]:
    """The first coefficient of `least_squares`, its lower and upper end, and all coefficients, (k,)."""
    coefficients, error, degrees = least_squares(values, regressors, clusters)
    half = t.ppf(0.975, degrees) * error
    first = np.array([coefficients[0], coefficients[0] - half, coefficients[0] + half])
    # Rounding may not give a sign to what is 0: a gain that is length alone would be left with one.
    first[np.abs(first) <= 1e-9 * np.abs(np.asarray(values, dtype=float)).max()] = 0
    left, low, high = first.tolist()
    return left, low, high, coefficients


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
    y = np.asarray(values, dtype=float)
    rows, share = len(y), float(y.mean())
    _, groups, sizes = np.unique(list(clusters), return_inverse=True, return_counts=True)
    errors, count = np.bincount(groups, y - share), len(sizes)
    kish = rows**2 / float((sizes**2).sum())
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


def few_conversations(count: int) -> str | None:
    """The line that warns of fewer than 30 conversations; else None. The figures are those of README's table."""
    if count >= FEWEST_REPORTED:
        return None
    return (
        f"Fewer than {FEWEST_REPORTED} conversations ({count}): intervals over so few are themselves uncertain, and "
        "too narrow where scores are skewed (simulated with 10 to 25 conversations, they held the truth in 94 to 95% "
        "of normal and in 90 to 93% of exponential samples)."
    )


def conversations_needed(differences: Sequence[float], clusters: Sequence[str]) -> float:
    """How many conversations would show a mean difference of the observed size: 5% two-sided, 80% power.

    That of the one-sample t test (Cohen 1988, ISBN 0-8058-0283-5, chapter 2) on conversations, their spread being the
    cluster-robust standard error times the square root of their number: where every row is a conversation of its own,
    the rows' own spread. It takes the observed difference and spread for the true ones and further conversations to be
    of this kind and size, and so is an order of magnitude, not a promise (Hoenig and Heisey 2001, doi
    10.1198/000313001300339897).

    Args:
        differences: one a row, (N,).
        clusters: the conversation of each row, (N,); at least two.
    """
    (mean,), error, _ = least_squares(differences, np.ones((len(differences), 1)), clusters)
    spread = float(error) * math.sqrt(len(set(clusters)))
    # Outside these bounds statsmodels finds no root; there it takes some 800 million conversations, or four.
    effect = min(max(abs(float(mean)) / spread, 1e-4), 3.0) if spread else 1e-4 if mean == 0 else 3.0
    return float(TTestPower().solve_power(effect, alpha=0.05, power=0.8))


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
    values: Sequence[float], covariate: Sequence[float], clusters: Sequence[str]
) -> tuple[float, float, float, float]:
    """What is left of a mean difference at a covariate of 0: the intercept of values = a + b covariate (ANCOVA).

    Values and covariate are paired differences, so a is the difference between replies of equal length. The interval is
    cluster-robust as that of `mean_interval`. Where the covariate does not vary, b is 0 and a is the mean.

    Returns:
        a, its lower and upper end, and b. With fewer than three conversations the interval is a itself (fewer than two
        where b is 0).
    """
    x = np.asarray(covariate, dtype=float)
    if np.ptp(x) <= 1e-9 * np.abs(x).max():
        return *mean_interval(values, clusters), 0.0
    left, low, high, (_, slope) = _interval(values, np.stack([np.ones_like(x), x], axis=1), clusters)
    return left, low, high, float(slope)
