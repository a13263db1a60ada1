import math

import numpy as np
import pytest
from scipy import stats

from h2s.report.intervals import (
    adjusted_interval,
    difference_text,
    mean_interval,
    share_interval,
    share_text,
    sign_test,
    sign_test_text,
)

# Means


def test_interval_of_a_sample_is_that_of_theory():
    """Clusters of one row are the ordinary bootstrap: near the mean's standard error times 1.96."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = mean_interval(values, [str(i) for i in range(400)])
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_interval_equals_scipys_bootstrap():
    values = np.random.default_rng(2).exponential(1.0, 40)
    _, low, high = mean_interval(values, [str(i) for i in range(40)], resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_whole_conversations_are_drawn():
    """Rows that repeat their conversation's value add nothing: the interval is that of the conversations."""
    values = np.random.default_rng(3).normal(size=30)
    clusters = [str(i) for i in range(30)]
    once = mean_interval(values, clusters)
    repeated = mean_interval(np.repeat(values, 10), np.repeat(clusters, 10))
    assert repeated == pytest.approx(once)
    as_if_independent = mean_interval(np.repeat(values, 10), list(range(300)))
    assert as_if_independent[2] - as_if_independent[1] < 0.5 * (once[2] - once[1])


def test_interval_of_two_conversations_by_hand():
    """(0 0 0) and (4): a draw holds the first twice, the second twice, or both; the mean weighs rows, so 1 of 4."""
    mean, low, high = mean_interval([0, 0, 0, 4], ["a", "a", "a", "b"])
    assert (mean, low, high) == (1, 0, 4)
    # A single draw holds both half of the time.
    draws = [mean_interval([0, 0, 0, 4], ["a", "a", "a", "b"], resamples=1, seed=s)[1] for s in range(400)]
    assert set(draws) == {0, 1, 4}
    assert draws.count(1) / 400 == pytest.approx(0.5, abs=0.08)


def test_interval_of_one_conversation_is_its_mean():
    assert mean_interval([1, 2, 6], ["a"] * 3) == (3, 3, 3)


def test_interval_is_the_same_each_time():
    values, clusters = np.random.default_rng(4).normal(size=20), [str(i // 2) for i in range(20)]
    assert mean_interval(values, clusters) == mean_interval(values, clusters)
    assert mean_interval(values, clusters, seed=1) != mean_interval(values, clusters)


# Shares


def wilson(right, rows, conversations):
    """scipy's, at the level at which its normal quantile is that of Student's t."""
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, max(conversations - 1, 1))) - 1
    interval = stats.binomtest(right, rows).proportion_ci(confidence_level=level, method="wilson")
    return pytest.approx((right / rows, interval.low, interval.high))


@pytest.mark.parametrize("right", [1, 13, 20, 39])
def test_share_of_independent_rows_is_scipys_wilson(right):
    values = [1.0] * right + [0.0] * (40 - right)
    assert share_interval(values, [str(i) for i in range(40)]) == wilson(right, 40, 40)


def test_share_of_repeated_rows_is_that_of_the_conversations():
    values = [1.0] * 13 + [0.0] * 27
    clusters = [str(i) for i in range(40)]
    assert share_interval(np.repeat(values, 5), np.repeat(clusters, 5)) == wilson(13, 40, 40)


@pytest.mark.parametrize(
    ("groups", "right", "size", "kish"),
    [
        # Residual sums 1, -1, 0, 0: Var = 2 / 64 * 4 / 3 = 1 / 24, so 0.25 / Var = 6, between 4 and 8.
        ([[1, 1], [0, 0], [1, 0], [1, 0]], 3, 6, 4),
        # Residual sums 1/7, 1/7, -2/7: 0.245 / Var = 65, more than there are rows.
        ([[1, 0], [1, 0], [1, 0, 0]], 3, 7, 49 / 17),
        # No variance between conversations: as many as these.
        ([[1, 0]] * 4, 2, 4, 4),
    ],
)
def test_effective_size_by_hand(groups, right, size, kish):
    values = [v for group in groups for v in group]
    clusters = [str(i) for i, group in enumerate(groups) for _ in group]
    assert share_interval(values, clusters) == wilson(right, size, kish)
    # In whatever order the rows come.
    order = np.random.default_rng(0).permutation(len(values))
    assert share_interval(np.array(values)[order], np.array(clusters)[order]) == wilson(right, size, kish)


def test_one_long_conversation_is_no_crowd():
    """100 rows of one and 20 times 2 of others: Kish's number is 140^2 / (100^2 + 20 * 2^2), and t has 1 degree."""
    values, clusters = np.ones(140), ["long"] * 100 + [str(i // 2) for i in range(40)]
    kish, t = 140**2 / 10_080, math.tan(0.475 * math.pi)  # t with 1 degree is Cauchy's
    assert share_interval(values, clusters) == pytest.approx((1, kish / (kish + t**2), 1))


def test_share_covers_the_truth_where_one_conversation_is_long():
    """Conversations that differ (shares by a beta distribution around 0.65): 95% of the intervals should hold it."""
    random = np.random.default_rng(7)
    sizes = [60] + [3] * 10
    clusters = np.repeat([str(i) for i in range(11)], sizes)
    held = 0
    for _ in range(200):
        shares = random.beta(0.65 * 4, 0.35 * 4, 11)
        _, low, high = share_interval(random.random(90) < np.repeat(shares, sizes), clusters)
        held += low <= 0.65 <= high
    assert held >= 180


def test_all_right_is_not_certain():
    """33 conversations of 3 rows, all right: the lower end is 33 / (33 + z^2), as of 33 rows and not of 99."""
    z = stats.t.ppf(0.975, 32)
    values, clusters = np.ones(99), np.repeat([str(i) for i in range(33)], 3)
    assert share_interval(values, clusters) == pytest.approx((1, 33 / (33 + z**2), 1))
    assert share_interval(1 - values, clusters) == pytest.approx((0, 0, z**2 / (33 + z**2)))
    assert all(0 <= end <= 1 for end in (*share_interval(values, clusters), *share_interval(1 - values, clusters)))


def test_share_of_one_conversation_by_hand():
    """Size 1: half / z = sqrt(1 + z^2) / 2 / (1 + z^2); z of t with 1 degree of freedom."""
    half = 12.7062 / 2 / math.sqrt(1 + 12.7062**2)
    assert share_interval([1, 1, 0, 0], ["a"] * 4) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-6)


def test_halves_are_shares_too():
    """Ties that count as half: rows of 0, 0.5, 0.5, 1 vary less than right and wrong; the size stays at most 4."""
    assert share_interval([0, 0.5, 0.5, 1], list("abcd")) == wilson(2, 4, 4)


def test_texts():
    assert share_text([1, 1, 0, 0], ["a"] * 4) == "0.500 [0.002, 0.998], n=4 (1 conversations)"
    assert difference_text([1, 2, 6], ["a"] * 3) == "+3.000 (no interval)"
    assert difference_text([0, 0, 0, -4], ["a", "a", "a", "b"]) == "-1.000 [-4.000, +0.000]"


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(3, 0, 2 / 8), (5, 1, 2 * (1 + 6) / 64), (1, 5, 2 * (1 + 6) / 64), (2, 2, 1), (1, 0, 1), (0, 0, 1)],
)
def test_sign_test_by_hand(wins, losses, p):
    """One row a conversation, and two ties."""
    differences = [2.0] * wins + [-0.5] * losses + [0.0] * 2
    conversations = [str(i) for i in range(len(differences))]
    assert sign_test(differences, conversations) == pytest.approx(p)
    assert sign_test_text(differences, conversations) == f"exact sign test p = {p:.3g}"


def test_sign_test_counts_conversations():
    """Eleven rows of four conversations, and their means: above 0, above 0, below 0, 0."""
    differences, conversations = [1, -2, 3, *[1] * 5, -1, 1, -1], [*"aaa", *"bbbbb", "c", *"dd"]
    assert sign_test(differences, conversations) == 1  # 2 against 1
    assert sign_test([1] * 24, [str(i % 2) for i in range(24)]) == pytest.approx(2 / 4)
    assert sign_test_text([1] * 24, [str(i % 2) for i in range(24)]) == "exact sign test over conversations p = 0.5"


# At equal length


@pytest.fixture
def sample():
    """12 conversations of 3 rows: 0.7 + 0.3 x, an effect of the conversation, and noise."""
    random = np.random.default_rng(5)
    clusters = np.repeat([f"c{i:02}" for i in range(12)], 3)
    x = random.integers(-20, 30, 36).astype(float)
    return 0.7 + 0.3 * x + np.repeat(random.normal(size=12), 3) + random.normal(size=36), x, clusters


def line(x, y):
    return np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), y, rcond=None)[0]


def test_adjusted_difference_is_least_squares(sample):
    y, x, clusters = sample
    left, low, high, slope = adjusted_interval(y, x, clusters)
    assert (left, slope) == pytest.approx(tuple(line(x, y)))
    assert low < left < high
    assert left != pytest.approx(y.mean(), abs=0.5)  # the length made a difference


def test_adjusted_ends_equal_a_slow_loop(sample):
    """Each draw's rows put together and fitted anew, in rows shuffled so that conversations are not neighbours."""
    y, x, clusters = (part[np.random.default_rng(6).permutation(36)] for part in map(np.asarray, sample))
    _, low, high, _ = adjusted_interval(y, x, clusters, resamples=300, seed=9)
    names = np.unique(clusters)
    intercepts = []
    for draw in np.random.default_rng(9).integers(0, 12, size=(300, 12)):
        rows = np.concatenate([np.flatnonzero(clusters == names[i]) for i in draw])
        intercepts.append(line(x[rows], y[rows])[0])
    assert (low, high) == pytest.approx(tuple(np.percentile(intercepts, [2.5, 97.5])))


def test_gain_that_is_length_alone_is_gone():
    """y = 0.5 x exactly: nothing is left in any resample."""
    x = np.arange(1.0, 21.0)
    adjusted = adjusted_interval(0.5 * x, x, [str(i // 2) for i in range(20)])
    assert adjusted == pytest.approx((0, 0, 0, 0.5), abs=1e-9)


@pytest.mark.parametrize("length", [0.0, 7.0, -250.0])
def test_constant_covariate_changes_nothing(sample, length):
    y, _, clusters = sample
    assert adjusted_interval(y, np.full(36, length), clusters) == pytest.approx((*mean_interval(y, clusters), 0))


def test_covariate_that_is_constant_but_for_rounding():
    """33.3 added up is not exact: what rounding leaves must not pass for a spread."""
    values = np.random.default_rng(5).normal(size=60)
    left, _, _, slope = adjusted_interval(values, np.full(60, 33.3), [str(i) for i in range(60)])
    assert slope == 0 and left == pytest.approx(values.mean())
