"""Expected numbers are computed by hand, in the comments or with `math` alone."""

import math

import pytest
import torch

from h2s.ppo.loss import (
    MAX_LOG_RATIO,
    approx_kl_per_token,
    explained_variance,
    k3_per_token,
    kl_to_reference,
    leave_one_out,
    masked_mean,
    policy_loss,
    whiten,
)

# Two responses: the first of 2 tokens in the middle of its row, the second of 1. What the mask hides is absurd.
MASK = torch.tensor([[False, True, True, False], [False, True, False, False]])
LOGPS = torch.tensor([[9.0, -1.0, -2.0, 7.0], [50.0, -0.5, 60.0, -70.0]])
OTHER = torch.tensor([[-9.0, -1.5, -1.0, 3.0], [-50.0, -0.7, -60.0, 70.0]])
# LOGPS - OTHER on tokens: 0.5, -1.0 | 0.2


def assert_numbers(x, expected):
    assert x.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_masked_mean():
    assert_numbers(masked_mean(LOGPS, MASK), [-1.5, -0.5])
    assert_numbers(masked_mean(LOGPS, torch.zeros_like(MASK)), [0, 0])  # of no token


def test_kl_is_the_sum_of_log_ratios():
    assert_numbers(kl_to_reference(LOGPS, OTHER, MASK), [-0.5, 0.2])


def test_kl_is_unbiased():
    """Its mean over samples is the KL by its definition."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    tokens = torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))[:, None]
    estimate = kl_to_reference(p.log()[tokens], q.log()[tokens], torch.ones_like(tokens, dtype=torch.bool)).mean()
    exact = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.6)  # 0.360
    assert estimate.item() == pytest.approx(exact, abs=0.02)
    k3 = k3_per_token(p.log()[tokens], q.log()[tokens], torch.ones_like(tokens, dtype=torch.bool)).mean()
    assert k3.item() == pytest.approx(exact, abs=0.02)


def test_k3():
    # ln r = -0.5, 1.0 | -0.2; r - 1 - ln r
    first = [math.exp(-0.5) - 1 + 0.5, math.e - 2]
    assert_numbers(k3_per_token(LOGPS, OTHER, MASK), [sum(first) / 2, math.exp(-0.2) - 1 + 0.2])
    assert_numbers(k3_per_token(LOGPS, LOGPS, MASK), [0, 0])


def test_approx_kl():
    # 0.5 * (0.25 + 1) / 2 | 0.5 * 0.04
    assert_numbers(approx_kl_per_token(LOGPS, OTHER, MASK), [0.3125, 0.02])


# Advantages and values


def test_whiten():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3
    std = math.sqrt(14 / 3)
    assert_numbers(whiten(x, x), [-2 / std, -1 / std, 0, 3 / std])
    for alone_or_equal, expected in (([2.5], [2.5]), ([1.5] * 4, [0] * 4)):
        assert_numbers(whiten(torch.tensor(alone_or_equal), torch.tensor(alone_or_equal)), expected)


def test_whiten_takes_the_moments_of_everyone():
    mine, everyone = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0, 5.0, 7.0])  # mean 4, variance 20/3
    std = math.sqrt(20 / 3)
    assert_numbers(whiten(mine, everyone), [-3 / std, -1 / std])


@pytest.mark.parametrize("value", [0.3, -2.7, 1e-3, 1234.1])
@pytest.mark.parametrize("count", [2, 12, 16, 4096])
def test_whiten_equal_values_that_float32_cannot_hold_gives_zeros(value, count):
    """Their mean is another number than they, by rounding; its spread is not theirs."""
    x = torch.full((count,), value)
    assert whiten(x[:2], x).tolist() == [0, 0]


def test_whiten_keeps_a_small_spread_around_a_large_mean():
    x = torch.tensor([999.0, 1001.0])  # variance 2
    assert_numbers(whiten(x, x), [-1 / math.sqrt(2), 1 / math.sqrt(2)])


def test_whiten_does_not_depend_on_shift_and_scale():
    x = torch.tensor([0.1, -2.0, 0.7, 5.0])
    assert_numbers(whiten(3 * x + 10, 3 * x + 10), whiten(x, x).tolist())


def test_leave_one_out():
    returns = torch.tensor([1.0, 2.0, 6.0, -4.0, math.nan, 8.0, math.nan, math.nan, 3.0])
    # Three contexts; of the second one reply was left out, of the third all but one.
    found = leave_one_out(returns, 3).tolist()
    assert found[:6] == [4.0, 3.5, 1.5, 8.0, 2.0, -4.0]
    assert found[6:8] == [3.0, 3.0] and math.isnan(found[8])


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 5, returns) == 1  # a constant error is no variance
    assert explained_variance(torch.full((3,), 9.0), returns) == 0
    # R - V = 2 R has four times the variance of R; 0, 0, 1 has a third of it.
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(torch.tensor([1.0, 2.0, 2.0]), returns) == pytest.approx(1 - (1 / 3))
    assert math.isnan(explained_variance(returns, torch.full((3,), 2.0)))
    assert math.isnan(explained_variance(torch.tensor([1.0]), torch.tensor([2.0])))
    # A response without a return does not count.
    gap = explained_variance(torch.tensor([1.0, 7.0, 2.0, 2.0]), torch.tensor([1.0, math.nan, 2.0, 3.0]))
    assert gap == pytest.approx(1 - (1 / 3))
    assert math.isnan(explained_variance(returns, torch.tensor([math.nan, math.nan, 2.0])))


# The clipped objective


def response(*log_ratios):
    """One response of as many tokens: (logps with a gradient, old_logps, mask)."""
    old = -torch.arange(1.0, len(log_ratios) + 1)[None]
    return (old + torch.tensor([log_ratios])).requires_grad_(), old, torch.ones_like(old, dtype=torch.bool)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "is_clipped"),
    [
        # The ratio's derivative is the ratio, so within the range d loss / d logp = -advantage * ratio.
        (1.1, 2.0, -2.2, -2.2, False),
        (1.1, -2.0, 2.2, 2.2, False),
        # Good and already likelier than 1.2 times: held there, no gradient.
        (1.5, 2.0, -2.4, 0.0, True),
        # Bad and already rarer than 0.8 times: held there, no gradient.
        (0.5, -2.0, 1.6, 0.0, True),
        # Bad and likelier, good and rarer: the pessimistic branch goes on pulling back.
        (1.5, -2.0, 3.0, 3.0, False),
        (0.5, 2.0, -1.0, -1.0, False),
    ],
)
def test_clipping_on_both_sides(ratio, advantage, loss, slope, is_clipped):
    half = math.log(ratio) / 2
    logps, old, mask = response(half, half)
    value, ratios, clipped = policy_loss(logps, old, mask, torch.tensor([advantage]), cliprange=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert_numbers(ratios, [ratio])
    assert clipped.tolist() == [is_clipped]
    assert_numbers(logps.grad[0], [slope, slope])


def test_whole_response_is_one_action():
    """Two responses of 2 and 1 tokens; what the mask hides counts nothing and gets no gradient."""
    logps = LOGPS.clone().requires_grad_()
    loss, ratios, clipped = policy_loss(logps, OTHER, MASK, torch.tensor([1.0, 3.0]), cliprange=0.3)
    loss.backward()
    # Ratios exp(-0.5) = 0.607, not clipped for a good one; exp(0.2) = 1.221 in the range.
    assert_numbers(ratios, [math.exp(-0.5), math.exp(0.2)])
    assert clipped.tolist() == [False, False]
    assert loss.item() == pytest.approx(-(math.exp(-0.5) + 3 * math.exp(0.2)) / 2, rel=1e-5)
    first, second = -math.exp(-0.5) / 2, -3 * math.exp(0.2) / 2
    assert_numbers(logps.grad[0], [0, first, first, 0])
    assert_numbers(logps.grad[1], [0, second, 0, 0])
    assert not ratios.requires_grad and not clipped.requires_grad


def test_mean_ratio_is_the_geometric_mean_a_token():
    # Log-ratios 0.5, -1.0 | 0.2 -> means -0.25 | 0.2; weights 2 | 1; mean length 1.5
    advantages = torch.tensor([1.0, 3.0])
    loss, ratios, clipped = policy_loss(LOGPS, OTHER, MASK, advantages, 0.6, ratio_norm="mean", mean_length=1.5)
    epsilon = math.log(1.6) / 1.5  # 0.313
    assert epsilon > 0.25
    assert_numbers(ratios, [math.exp(-0.25), math.exp(0.2)])
    assert clipped.tolist() == [False, False]
    assert loss.item() == pytest.approx(-(2 * math.exp(-0.25) + 3 * math.exp(0.2)) / 2, rel=1e-5)


@pytest.mark.parametrize(("advantage", "sign"), [(2.0, 1), (-2.0, -1)])
def test_mean_clips_a_token_at_a_share_of_the_response(advantage, sign):
    """A response of mean length is clipped where `none` clips upwards: at a summed log-ratio of ln 1.2."""
    edge = math.log(1.2) / 3
    for log_ratio, is_clipped in ((0.99 * edge, False), (1.01 * edge, True)):
        logps, old, mask = response(*[sign * log_ratio] * 3)
        loss, _, clipped = policy_loss(logps, old, mask, torch.tensor([advantage]), 0.2, "mean", mean_length=3.0)
        assert clipped.tolist() == [is_clipped]
        expected = -advantage * math.exp(sign * min(log_ratio, edge)) * 3
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        assert bool(logps.grad.any()) != is_clipped
        if sign > 0:
            assert policy_loss(logps, old, mask, torch.tensor([advantage]), 0.2)[2].tolist() == [is_clipped]


def test_mean_has_the_gradient_of_none_at_ratio_one():
    """Exactly, for responses of unlike lengths: the lengths' weights undo the mean."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(5, 8, generator=generator)
    mask = torch.arange(8)[None] < torch.tensor([[1], [2], [4], [8], [5]])
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25])
    gradients = []
    for norm in ("none", "mean"):
        logps = old.clone().requires_grad_()
        loss, ratios, clipped = policy_loss(logps, old, mask, advantages, 0.2, norm, mean_length=4.0)
        loss.backward()
        assert_numbers(ratios, [1] * 5)
        assert not clipped.any()
        gradients.append(logps.grad)
    # By hand: -advantage / 5 on each token of a response.
    expected = -(advantages[:, None] / 5) * mask
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["none", "mean"])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_huge_log_ratios_stay_finite(norm, log_ratio, advantage):
    logps, old, mask = response(log_ratio, log_ratio)
    loss, ratios, _ = policy_loss(logps, old, mask, torch.tensor([advantage]), 0.2, norm, mean_length=2.0)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    limit = math.exp(math.copysign(MAX_LOG_RATIO, log_ratio))
    assert_numbers(ratios, [limit])


def test_the_log_ratio_limit_is_beyond_any_clip_range():
    assert 10 * math.log(2) < MAX_LOG_RATIO
