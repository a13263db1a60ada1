"""The value head: a regression by hand, its unit of the rewards, and that it learns beside a policy that moves."""

import statistics

import pytest
import torch
from ppo.runs import logged, varied
from safetensors.torch import load_file

from h2s.ppo.value_head import VALUE_HEAD_FILE, ValueHead

NAN = float("nan")


@pytest.fixture
def head():
    """One that was fitted."""
    torch.manual_seed(0)
    head = ValueHead(4)
    torch.nn.init.normal_(head.out.weight)
    head.out.bias.data.fill_(0.5)
    return head


def test_by_hand(head):
    """w tanh(W norm(h) + b) + c in float64; 0 of every context until it is fitted."""
    hidden = 40 * torch.randn(3, 4) + 7
    assert ValueHead(4)(hidden).tolist() == [0, 0, 0]
    w, b, v = (p.detach().double() for p in (head.dense.weight, head.dense.bias, head.out.weight))
    for h, value in zip(hidden.double(), head(hidden), strict=True):
        normal = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
        expected = sum(v[0, i] * torch.tanh(w[i] @ normal + b[i]) for i in range(4)) + 0.5
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_size_of_hidden_states_saturates_nothing(head):
    """Gemma's have an rms of 4 to 100."""
    torch.manual_seed(1)
    wide, hidden = ValueHead(256), torch.randn(8, 256)
    assert wide.saturated(100 * hidden).tolist() == wide.saturated(hidden).tolist()
    assert wide.saturated(hidden).max() < 0.05
    wide.dense.weight.data *= 100
    assert wide.saturated(hidden).min() > 0.9


def test_a_fit_begins_at_the_mean_and_explains_the_rest():
    torch.manual_seed(0)
    head, hidden = ValueHead(32), torch.randn(64, 32)
    returns = -30 + 2 * (hidden[:, 0] > 0).float()
    returns[:8] = NAN
    for _ in range(10):
        head.fit(hidden, returns, 0.1)
    error = (head(hidden) - returns)[8:]
    assert error.square().mean() < 0.1
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.fit(hidden, torch.full((64,), NAN), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_a_fit_is_repeated_to_the_bit():
    """No state lies between fits but the head itself."""
    heads, hidden, returns = [], torch.randn(6, 8), torch.randn(6)
    for _ in range(2):
        torch.manual_seed(0)
        heads.append(ValueHead(8))
    heads[0].fit(hidden, returns, 1e-2)
    heads[1].load_state_dict({name: value.clone() for name, value in heads[0].state_dict().items()})
    for head in heads:
        head.fit(hidden, returns + 1, 1e-2)
    assert torch.equal(*(head.dense.weight for head in heads)) and heads[0].out.weight.any()


def test_the_unit_of_the_rewards():
    scores = [-3.0, 5.0, 1.0, 2.0]
    head = ValueHead(4)
    assert head.in_units(torch.tensor(scores)).tolist() == scores
    head.measure_rewards(torch.tensor([NAN, *scores]))
    mean, std = statistics.mean(scores), statistics.stdev(scores)
    assert head.in_units(torch.tensor([10.0])).item() == pytest.approx((10 - mean) / std)
    # The last's spread is what float32 makes of their mean.
    for without_spread in ([NAN, NAN], [7.0], [7.0, 7.0], [0.1] * 48):
        head.measure_rewards(torch.tensor(without_spread))
        assert head.reward_std.item() == pytest.approx(std)


def test_as_a_file(head, tmp_path):
    head.measure_rewards(torch.tensor([1.0, 3.0]))
    head.save(tmp_path)
    other = ValueHead(4)
    other.load(tmp_path)
    saved = load_file(tmp_path / VALUE_HEAD_FILE)
    names = {"dense.weight", "dense.bias", "out.weight", "out.bias", "reward_mean", "reward_std"}
    assert saved.keys() == other.state_dict().keys() == names
    for name, value in head.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and torch.equal(saved[name], value)


def test_it_learns_beside_a_policy_that_moves(build):
    """A reward of two kinds of context, with 0.3 of noise: what is between them is 0.96 of the variance."""

    def reward(prompts, completions, **kwargs):
        return [2.0 * (len(p) > 1) + 0.3 * v for p, v in zip(prompts, varied(completions), strict=True)]

    trainer = build(reward, max_steps=25, num_ppo_epochs=1, per_device_train_batch_size=8, contexts=range(24))
    trainer.train()
    explained, saturated = (logged(trainer, f"value/{name}") for name in ("explained_variance", "saturated"))
    assert len(explained) == 25 and sum(explained[-5:]) / 5 > 0.6, explained
    assert max(saturated) < 0.1, saturated
