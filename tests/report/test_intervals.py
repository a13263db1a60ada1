import math

import numpy as np
import pytest
from scipy import linalg, stats
from tiny import ROOT

from h2s.report.intervals import (
    adjusted_interval,
    between_share,
    conversations_needed,
    difference_text,
    least_squares,
    mean_interval,
    share_interval,
    share_text,
    sign_test,
    sign_test_text,
)


def cr2(values, regressors, clusters):
    """The first coefficient of least squares and its 95% interval, by CR2's formulas as they stand: (N,), (N, k), (N,).

    Of each conversation the root of the inverse of I - H_gg, and V = sum (p_g' y)^2, whose degrees of freedom are
    those of the matrix p_g' p_h (Imbens and Kolesar 2016, section III).
    """
    y, x, clusters = np.asarray(values, dtype=float), np.asarray(regressors, dtype=float), np.asarray(clusters)
    weights = np.linalg.pinv(x)  # (k, N)
    maker = np.eye(len(y)) - x @ weights
    of_each = []
    for name in sorted(set(clusters)):
        mine = clusters == name
        root = linalg.fractional_matrix_power(maker[np.ix_(mine, mine)], -0.5)
        of_each.append(maker[:, mine] @ root @ weights[0, mine])
    p = np.stack(of_each, 1)
    matrix = p.T @ p
    degrees = np.trace(matrix) ** 2 / (matrix**2).sum()
    half = stats.t.ppf(0.975, degrees) * np.linalg.norm(p.T @ y)
    left = weights[0] @ y
    return left, left - half, left + half


@pytest.fixture
def sample():
    """12 conversations of 1 to 5 rows, mixed: 0.7 + 0.3 x, an effect of the conversation, and noise."""
    random = np.random.default_rng(5)
    sizes = random.integers(1, 6, 12)
    clusters = np.repeat([f"c{i:02}" for i in range(12)], sizes)
    x = random.integers(-20, 30, len(clusters)).astype(float)
    y = 0.7 + 0.3 * x + np.repeat(random.normal(size=12), sizes) + random.normal(size=len(clusters))
    order = random.permutation(len(clusters))
    return y[order], x[order], clusters[order]


def with_ones(x):
    return np.stack([np.ones_like(x), x], 1)


# Means


def test_mean_interval_is_cr2(sample):
    y, _, clusters = sample
    assert mean_interval(y, clusters) == pytest.approx(cr2(y, np.ones((len(y), 1)), clusters))


def test_interval_of_independent_rows_is_the_one_sample_t_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 25)
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    expected = (values.mean(), theirs.low, theirs.high)
    assert mean_interval(values, [str(i) for i in range(25)]) == pytest.approx(expected)


def test_repeated_rows_add_nothing():
    """Rows that repeat their conversation's value: the interval is that of the conversations."""
    values = np.random.default_rng(3).normal(size=30)
    clusters = [str(i) for i in range(30)]
    once = mean_interval(values, clusters)
    assert mean_interval(np.repeat(values, 10), np.repeat(clusters, 10)) == pytest.approx(once)
    as_if_independent = mean_interval(np.repeat(values, 10), list(range(300)))
    assert as_if_independent[2] - as_if_independent[1] < 0.5 * (once[2] - once[1])


@pytest.mark.parametrize(
    ("groups", "error", "degrees"),
    [
        # Sums of residuals -3 and 3, shares of the rows 3/4 and 1/4: Var = (9 / (1/4) + 9 / (3/4)) / 4^2 = 3.
        ([[0, 0, 0], [4]], math.sqrt(3), 1),
        # Sums -3, 0, 3, shares 1/3: Var = (18 / (2/3)) / 6^2 = 3 / 4.
        ([[1, 0], [2, 2], [2, 5]], math.sqrt(3) / 2, 2),
        # Sums -2, 0, 2, shares 1/4, 1/4, 1/2: Var = (4 / (3/4) + 4 / (1/2)) / 4^2 = 5 / 6. The matrix p_g' p_h has
        # 1, 1, 2 on its diagonal and beside it -1/3, -sqrt(2/3), -sqrt(2/3): 4^2 / (6 + 2 (1/9 + 4/3)) = 1.8.
        ([[0], [2], [1, 5]], math.sqrt(5 / 6), 1.8),
    ],
)
def test_mean_interval_by_hand(groups, error, degrees):
    values = [v for group in groups for v in group]
    clusters = [str(i) for i, group in enumerate(groups) for _ in group]
    mean, t = sum(values) / len(values), stats.t.ppf(0.975, degrees)
    assert mean_interval(values, clusters) == pytest.approx((mean, mean - t * error, mean + t * error), rel=1e-5)


@pytest.mark.parametrize("values", [[1, 2, 6], [3]])
def test_interval_of_one_conversation_is_its_mean(values):
    assert mean_interval(values, ["a"] * len(values)) == pytest.approx((3, 3, 3))


@pytest.mark.parametrize("value", [0.0, 0.1, -33.3])
@pytest.mark.parametrize("conversations", [1, 2, 7])
@pytest.mark.filterwarnings("error")
def test_interval_of_equal_values_has_no_width(value, conversations):
    clusters = [str(i % conversations) for i in range(14)]
    assert mean_interval([value] * 14, clusters) == pytest.approx((value,) * 3)
    adjusted = adjusted_interval([value] * 14, range(14), clusters)
    assert adjusted == pytest.approx((value, value, value, 0), abs=1e-12)


# How often an interval holds the truth

SIMULATED = (10, 16, 25, 49)  # conversations
SIZES = [1, 1, 1, 2, 2, 3, 4, 8]  # of conversations: rows, over and over


def coverage(conversations, draw, ragged, length, samples=8_000):
    """The share of simulated intervals that hold the truth, 0; 0.95 give or take 0.0025 were right.

    Args:
        conversations: how many.
        draw: of `(random, size)`, with mean 0 and variance 1.
        ragged: whether they have `SIZES` rows, of which the conversation is 0.3 of the variance, else one row each.
        length: whether a difference in length carries a part of the score, which is taken out.
    """
    random = np.random.default_rng(conversations)
    clusters = np.repeat(np.arange(conversations), np.resize(SIZES if ragged else [1], conversations))
    x = random.normal(3, 3, conversations)[clusters] + random.normal(0, 4, len(clusters))
    own = draw(random, (conversations, samples))[clusters]
    values = math.sqrt(0.3) * own + math.sqrt(0.7) * draw(random, (len(clusters), samples)) if ragged else own
    regressors = with_ones(x) if length else np.ones((len(x), 1))
    coefficients, error, degrees = least_squares(values + 0.2 * x[:, None] * length, regressors, clusters)
    return (np.abs(coefficients[0]) <= stats.t.ppf(0.975, degrees) * error).mean()


def normal(random, size):
    return random.normal(size=size)


def exponential(random, size):
    return random.exponential(size=size) - 1


@pytest.mark.parametrize("length", [False, True], ids=["mean", "at equal length"])
@pytest.mark.parametrize("ragged", [False, True], ids=["one row", "ragged"])
@pytest.mark.parametrize("conversations", SIMULATED)
def test_intervals_cover_the_truth(conversations, ragged, length):
    assert 0.93 <= coverage(conversations, normal, ragged, length) <= 0.97


def test_rows_taken_for_independent_would_not_cover():
    """The simulation can fail: as if each row were a conversation of its own."""
    random = np.random.default_rng(7)
    sizes = np.resize(SIZES, 16)
    own = np.repeat(random.normal(size=(16, 4_000)), sizes, axis=0)
    values = math.sqrt(0.3) * own + math.sqrt(0.7) * random.normal(size=own.shape)
    (mean,), error, degrees = least_squares(values, np.ones((len(values), 1)), range(len(values)))
    assert (np.abs(mean) <= stats.t.ppf(0.975, degrees) * error).mean() < 0.85


def share_coverage(conversations, samples=1_000):
    """Of shares of 0.65 in `SIZES` rows, whose conversations differ by a beta distribution (0.2 of the variance)."""
    random = np.random.default_rng(conversations)
    clusters = np.repeat(np.arange(conversations), np.resize(SIZES, conversations))
    held = 0
    for shares in random.beta(0.65 * 4, 0.35 * 4, (samples, conversations)):
        _, low, high = share_interval(random.random(len(clusters)) < shares[clusters], clusters)
        held += low <= 0.65 <= high
    return held / samples


def test_coverage_is_what_readme_says():
    """Every row of its table, to the percent (shares: to two)."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| conversations | 10 |")[1].split("\n\n")[0]
    rows = [line.strip().strip("|").split("|") for line in table.splitlines()[2:]]
    said = {what.strip(): [int(cell) for cell in cells] for what, *cells in rows}
    assert len(said) == 5
    for what, percents in said.items():
        for conversations, percent in zip(SIMULATED, percents, strict=True):
            if what.startswith("shares"):
                assert 100 * share_coverage(conversations) == pytest.approx(percent, abs=2)
            else:
                draw = exponential if "exponential" in what else normal
                found = coverage(conversations, draw, "1 to 8 rows" in what, length=False)
                assert 100 * found == pytest.approx(percent, abs=0.6), (what, conversations)


def test_least_squares_of_many_samples_is_that_of_each(sample):
    y, x, clusters = sample
    many = np.stack([y, y[::-1], 3 * x - y], 1)
    coefficients, error, degrees = least_squares(many, with_ones(x), clusters)
    for values, its, width in zip(many.T, coefficients.T, error, strict=True):
        alone = least_squares(values, with_ones(x), clusters)
        assert (its, width, degrees) == (pytest.approx(alone[0]), pytest.approx(alone[1]), alone[2])


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
    # sqrt(3) times Student's t with 1 degree of freedom.
    assert difference_text([0, 0, 0, -4], ["a", "a", "a", "b"]) == "-1.000 [-23.008, +21.008]"
    # Least squares leave it a hair below 0.
    assert difference_text([1, -1], ["a", "a"]) == "+0.000 (no interval)"


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


def test_adjusted_interval_is_cr2(sample):
    y, x, clusters = sample
    left, low, high, slope = adjusted_interval(y, x, clusters)
    assert (left, low, high) == pytest.approx(cr2(y, with_ones(x), clusters))
    assert slope == pytest.approx(np.polyfit(x, y, 1)[0])
    assert left != pytest.approx(y.mean(), abs=0.5)  # the length made a difference


def test_adjusted_interval_by_hand():
    """Conversations a, a, b, c at x = -1, 1, 0, 0: a = 1, b = 1 and residuals 1, 1, -1, -1.

    Their sums are 2, -1, -1; x is 0 on average, so the intercept has the weights of a mean, shares 1/2, 1/4, 1/4 of it
    and their 1.8 degrees: Var = (4 / (1/2) + 1 / (3/4) + 1 / (3/4)) / 4^2 = 2 / 3.
    """
    half = stats.t.ppf(0.975, 1.8) * math.sqrt(2 / 3)
    adjusted = adjusted_interval([1, 3, 0, 0], [-1, 1, 0, 0], list("aabc"))
    assert adjusted == pytest.approx((1, 1 - half, 1 + half, 1), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_gain_that_is_length_alone_is_gone():
    """y = 0.3 x exactly, and no rounding error passes for a gain."""
    x = np.arange(1.0, 21.0)
    left, low, high, slope = adjusted_interval(0.3 * x, x, [str(i // 2) for i in range(20)])
    assert (left, low, high) == (0, 0, 0) and slope == pytest.approx(0.3)


@pytest.mark.parametrize("length", [0.0, 7.0, -250.0])
def test_constant_covariate_changes_nothing(sample, length):
    y, _, clusters = sample
    assert adjusted_interval(y, np.full(len(y), length), clusters) == (*mean_interval(y, clusters), 0)


def test_covariate_that_is_constant_but_for_rounding():
    """What rounding leaves must not pass for a spread."""
    values, clusters = np.random.default_rng(5).normal(size=60), [str(i) for i in range(60)]
    assert adjusted_interval(values, [0.3, 0.1 + 0.2] * 30, clusters) == (*mean_interval(values, clusters), 0)


@pytest.mark.parametrize(
    ("values", "covariate", "clusters"),
    [([3], [2], "a"), ([2, 3, 5], [1, 2, 3], "aaa"), ([2, 3], [1, 2], "ab"), ([1, 2, 4, 5], [3, 3, 6, 6], "aabb")],
)
@pytest.mark.filterwarnings("error")
def test_two_conversations_cannot_say_how_sure_a_line_is(values, covariate, clusters):
    """It may pass through both, which is no certainty: the interval is the intercept itself."""
    left, low, high, slope = adjusted_interval(values, covariate, list(clusters))
    assert low == left == high
    if len(values) > 1:
        assert (slope, left) == pytest.approx(tuple(np.polyfit(covariate, values, 1)))
    else:
        assert (slope, left) == pytest.approx((0, 3))


@pytest.mark.parametrize("scale", range(1, 30))
@pytest.mark.filterwarnings("error")
def test_variance_that_rounds_to_below_zero(scale):
    """The line through (0, 0), (2, 1) and (2, -1) has an intercept without variance, and rounding makes it negative."""
    adjusted = adjusted_interval([0, 1, -1], np.array([0, 2, 2]) * scale, list("abc"))
    assert adjusted == pytest.approx((0, 0, 0, 0), abs=1e-5)


# The share between rows


def test_between_share_by_hand():
    """Rows 1, 3; 5, 7; 3, 5: means 2, 6, 4 around 4, so 2 (4 + 4 + 0) / 2 = 8 between, and 2 within."""
    values = np.array([[1.0, 3.0], [5.0, 7.0], [3.0, 5.0]])
    share, low, high = between_share(values, "abc")
    assert share == pytest.approx((8 - 2) / (8 + 2)) and low < share < high < 1
    # F(2, 3) at 0.975 is 16.04, F(3, 2) 39.17.
    assert low == pytest.approx((4 / 16.04 - 1) / (4 / 16.04 + 1), abs=1e-3)
    assert high == pytest.approx((4 * 39.17 - 1) / (4 * 39.17 + 1), abs=1e-3)
    assert between_share(values[:, :1] + [0.0, 0.0], "abc") == (1, 1, 1)
    assert between_share(np.vstack([values, [[np.nan, 9.0]]]), "abcd") == (share, low, high)
    for nothing in (values[:1], values[:, :1], np.ones((3, 2))):
        assert np.isnan(between_share(nothing, "abc"[: len(nothing)])).all()


def test_between_share_takes_one_row_a_conversation():
    """The first that is known."""
    values = np.array([[1.0, 3.0], [np.nan, 2.0], [5.0, 7.0], [9.0, 0.0], [3.0, 5.0], [8.0, 8.0]])
    assert between_share(values, "abbacc") == between_share(values[[0, 2, 4]], "abc")


def test_between_share_covers():
    """A true share of 0.6."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(4_000):
        values = 0.6**0.5 * rng.normal(size=(16, 1)) + 0.4**0.5 * rng.normal(size=(16, 2))
        _, low, high = between_share(values, range(16))
        covered += low <= 0.6 <= high
    assert 0.93 <= covered / 4_000 <= 0.97


# How many would show it


def power(effect, count):
    """Of the two-sided t test at 5%, by scipy's noncentral t."""
    edge = stats.t.ppf(0.975, count - 1)
    shift = effect * math.sqrt(count)
    return stats.nct.sf(edge, count - 1, shift) + stats.nct.cdf(-edge, count - 1, shift)


@pytest.mark.parametrize("mean", [0.3, 0.5, -0.8, 1.5])
def test_conversations_needed_have_80_percent_power(mean):
    """Rows that are conversations of their own: Cohen's d is their mean over their spread."""
    noise = np.random.default_rng(0).normal(size=24)
    values = mean + (noise - noise.mean()) / noise.std(ddof=1)
    needed = conversations_needed(values.tolist(), [str(i) for i in range(24)])
    assert power(abs(mean), math.floor(needed)) < 0.8 <= power(abs(mean), math.ceil(needed))


def test_conversations_needed_count_conversations():
    """Cohen's table 2.3.5 has 34 for d = 0.5; rows that repeat their conversation's value add nothing."""
    noise = np.random.default_rng(0).normal(size=24)
    values = (0.5 + (noise - noise.mean()) / noise.std(ddof=1)).tolist()
    names = [str(i) for i in range(24)]
    assert math.ceil(conversations_needed(values, names)) == 34
    assert conversations_needed(values * 3, names * 3) == pytest.approx(conversations_needed(values, names), rel=0.05)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0, 0, 0], 1e8, math.inf), ([1, -1, 0], 1e8, math.inf), ([100, 101], 2, 4), ([5, 5, 5], 2, 4)],
)
def test_conversations_needed_at_the_edges(values, low, high):
    assert low < conversations_needed(values, [str(i) for i in range(len(values))]) < high
