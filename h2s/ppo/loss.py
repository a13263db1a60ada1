"""The arithmetic of single-step PPO: tensors in, tensors out.

The whole response is one action (Schulman et al. 2017, arXiv 1707.06347, with an episode of one step). Letters: B
responses, T positions; `mask` is True on a response's own tokens, its stop token included.
"""

import math

import torch

# exp(20) is far beyond any clip range; it only keeps the unclipped branch finite.
MAX_LOG_RATIO = 20.0
# A spread below this share of the mean is float32's rounding, whose unit is 1e-7.
ROUNDING = 1e-6


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each response's tokens: (B, T), (B, T) -> (B,)."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def kl_to_reference(logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """k1 estimate of each response's KL to the reference, summed over its tokens: (B, T) x 3 -> (B,), in nats.

    http://joschu.net/blog/kl-approx.html. Detached by its caller: it belongs into the reward, since the gradient of a
    KL estimator is not the gradient of the KL (arXiv 2506.09477).
    """
    return ((logps - ref_logps) * mask).sum(1)


def k3_per_token(logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """k3 estimate of the KL a token, which is never negative: r - 1 - ln r with r = p_ref / p. (B, T) x 3 -> (B,)."""
    log_r = (ref_logps - logps) * mask
    return masked_mean(log_r.exp() - 1 - log_r, mask)


def approx_kl_per_token(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far an update has moved the policy: 0.5 (ln p - ln p_old)^2, a mean over tokens. (B, T) x 3 -> (B,)."""
    return masked_mean(0.5 * (logps - old_logps) ** 2, mask)


def whiten(x: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std with the moments of the global batch. A batch of one has no spread and stays as it is.

    Equal values give 0, also where float32 cannot hold their mean and they differ from it by rounding.

    Args:
        x: this process's values, shape (B,).
        everyone: all processes' values, shape (B * world_size,).
    """
    if everyone.numel() < 2:
        return x
    mean, std = everyone.mean(), everyone.std()
    if std < ROUNDING * mean.abs():
        return torch.zeros_like(x)
    return (x - mean) / (std + 1e-8)


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    cliprange: float,
    ratio_norm: str = "none",
    mean_length: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clipped objective (arXiv 1707.06347, eq. 7) with one ratio and one advantage a response.

    `none`: the ratio is that of the whole response, exp(sum of log-ratios), clipped to [1 - cliprange, 1 + cliprange].
    `mean`: the ratio is its geometric mean a token (GSPO, arXiv 2507.18071, eq. 7), each response weighted by its
    length, so that at ratio 1 the gradient is exactly that of `none`; the trust region is a token's, and for a
    response of `mean_length` tokens as wide as that of `none`: epsilon = ln(1 + cliprange) / mean_length.

    Args:
        logps: log-probabilities under the policy, shape (B, T).
        old_logps: under the policy that sampled, shape (B, T).
        mask: the responses' tokens, shape (B, T).
        advantages: shape (B,).
        cliprange: epsilon of a whole response.
        ratio_norm: `none` or `mean`.
        mean_length: tokens a response on average over the global batch; only `mean` uses it.

    Returns:
        The loss (scalar), the ratios (B,), and which responses were clipped (B,).
    """
    log_ratio = ((logps - old_logps) * mask).sum(1)
    lengths = mask.sum(1).clamp(min=1)
    weight: torch.Tensor | float = 1.0
    low, high = 1 - cliprange, 1 + cliprange
    if ratio_norm == "mean":
        log_ratio = log_ratio / lengths
        weight = lengths
        epsilon = math.log1p(cliprange) / mean_length
        low, high = math.exp(-epsilon), math.exp(epsilon)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(low, high)
    loss = (weight * torch.maximum(unclipped, clipped)).mean()
    return loss, ratio.detach(), (clipped > unclipped).detach()


def leave_one_out(returns: torch.Tensor, num_generations: int) -> torch.Tensor:
    """The baseline of a reply: the mean return of the other replies to its context (RLOO, arXiv 2402.14740).

    Args:
        returns: shape (B,), the `num_generations` replies to a context side by side; NaN for a reply without one.
        num_generations: k, which divides B.

    Returns:
        The baselines, shape (B,); NaN where no other reply to the context has a return.
    """
    by_context = returns.view(-1, num_generations)
    counted = (~by_context.isnan()).long()
    others = by_context.nansum(1, keepdim=True) - by_context.nan_to_num(nan=0.0)
    return (others / (counted.sum(1, keepdim=True) - counted)).view(-1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is a perfect value head, 0 one that predicts a constant. NaN where R is constant.

    Responses without a return (NaN) do not count.
    """
    values, returns = values[~returns.isnan()], returns[~returns.isnan()]
    if returns.numel() < 2 or returns.var() == 0:
        return float("nan")
    return (1 - (returns - values).var() / returns.var()).item()
