"""The policy with its value head: what it says of a rollout, and the head as a file."""

import pytest
import torch
from ppo.runs import BATCH
from safetensors.torch import load_file

from h2s.ppo.policy import VALUE_HEAD_FILE, PolicyWithValueHead, ValueHead
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Batch

COMPLETIONS = [[50, 60, 70, 5], [51, 5], [52, 61, 62], [53, 5], [54], [55, 60, 61, 62, 63, 5]]


@pytest.fixture
def model(policy):
    """With a prefix and a head that have moved."""
    with torch.no_grad():
        noise = torch.randn(soft_prefix(policy.model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(policy.model).add_(noise)
    torch.manual_seed(0)
    model = PolicyWithValueHead(policy.model)
    torch.nn.init.normal_(model.value_head.out.weight)
    return model.eval()


def batch_of(policy, prompts, completions):
    return Batch.from_rows(policy.tokenizer, prompts, completions, policy.model.device)


def test_value_head_by_hand():
    """w tanh(W h + b) + c in float64; 0 of every context until it is trained."""
    torch.manual_seed(0)
    head, hidden = ValueHead(4), torch.randn(3, 4)
    assert head(hidden).tolist() == [0, 0, 0]
    torch.nn.init.normal_(head.out.weight)
    head.out.bias.data.fill_(0.5)
    w, b, v = (p.detach().double() for p in (head.dense.weight, head.dense.bias, head.out.weight))
    expected = [sum(v[0, i] * torch.tanh(w[i] @ h + b[i]) for i in range(4)) + 0.5 for h in hidden.double()]
    assert head(hidden).tolist() == pytest.approx([e.item() for e in expected], abs=1e-6)


def test_forward_is_the_plain_models_own(policy, model, prompts):
    """Row by row, unpadded, in float64: log-probabilities, entropies, and the head on the last prompt position."""
    batch = batch_of(policy, prompts, COMPLETIONS)
    logps, entropy, values = model(batch.input_ids, batch.attention_mask, batch.completion_mask)
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        with torch.no_grad():
            output = policy.model(torch.tensor([prompt + completion]), output_hidden_states=True)
        lines = output.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        where = slice(len(prompt), len(prompt) + len(completion))
        expected = lines.gather(1, torch.tensor(completion)[:, None])[:, 0].float()
        torch.testing.assert_close(logps[i, where], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy[i, where], -(lines.exp() * lines).sum(1).float(), rtol=0, atol=1e-4)
        value = model.value_head(output.hidden_states[-1][0, len(prompt) - 1])
        assert values[i].item() == pytest.approx(value.item(), abs=1e-4)
    assert not logps[~batch.completion_mask].any() and not entropy[~batch.completion_mask].any()
    assert values.std() > 1e-2


def test_the_value_loss_does_not_move_the_prefix(policy, model, prompts):
    batch = batch_of(policy, prompts, COMPLETIONS)
    model(batch.input_ids, batch.attention_mask, batch.completion_mask)[2].sum().backward()
    assert soft_prefix(policy.model).grad is None
    assert all(p.grad.abs().sum() > 0 for p in model.value_head.parameters())


@pytest.mark.parametrize("parts", [1, 4, 6])
def test_scoring_in_parts_is_scoring_at_once(policy, model, prompts, parts):
    """The soft prefix as `forward` gives it, the hard prompt as text: with the prefix's tokens before the row."""
    batch, rows = batch_of(policy, prompts, COMPLETIONS), []
    embeddings = policy.model.get_base_model().get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    scores = model.score(batch, parts)
    hook.remove()
    assert max(rows) == -(-BATCH // parts) and len(rows) == 2 * -(-BATCH // max(rows))
    with torch.no_grad():
        whole = model(batch.input_ids, batch.attention_mask, batch.completion_mask)
    for found, expected in zip((scores.logps, scores.entropy, scores.values), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.value_head(scores.last_prompt), scores.values)
    base = policy.model.get_base_model()
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = base(torch.tensor([policy.prefix.token_ids + prompt + completion])).logits[0]
        lines = logits[-len(completion) - 1 : -1].log_softmax(-1)
        where = slice(len(prompt), len(prompt) + len(completion))
        expected = lines.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(scores.ref_logps[i, where], expected, rtol=0, atol=1e-4)
    assert not scores.ref_logps[~batch.completion_mask].any()
    assert (scores.logps - scores.ref_logps).abs().max() > 0.1
    assert policy.model.active_adapter == "default" and scores.values.shape == (BATCH,)


def test_value_is_not_read_at_a_pad_position(policy, model, prompts):
    """Beside a much longer prompt, a short prompt has the value that it has alone."""
    short, long = min(prompts, key=len), max(prompts, key=len) * 2

    def values(*rows):
        b = batch_of(policy, rows, [[50]] * len(rows))
        with torch.no_grad():
            return model(b.input_ids, b.attention_mask, b.completion_mask)[2]

    assert values(short, long)[0].item() == pytest.approx(values(short)[0].item(), abs=1e-4)
    assert abs(values(short, long)[0] - values(short, long)[1]) > 1e-2


def test_temperature_divides_the_logits(policy, model, prompts):
    cool = PolicyWithValueHead(policy.model, temperature=0.5)
    batch = batch_of(policy, prompts[:1], [[50]])
    with torch.no_grad():
        found = cool(batch.input_ids, batch.attention_mask, batch.completion_mask)[0][0, -1]
        logits = policy.model(torch.tensor([prompts[0]])).logits[0, -1]
    assert found.item() == pytest.approx((logits / 0.5).log_softmax(-1)[50].item(), abs=1e-4)


def test_the_head_as_a_file(policy, model, tmp_path):
    """Safetensors, written by the main process alone; the prefix is not in it."""
    model.save_value_head(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    model.save_value_head(tmp_path)
    assert load_file(tmp_path / VALUE_HEAD_FILE).keys() == {"dense.weight", "dense.bias", "out.weight", "out.bias"}
    other = PolicyWithValueHead(policy.model)
    assert not torch.equal(other.value_head.out.weight, model.value_head.out.weight)
    other.load_value_head(tmp_path)
    for name, value in model.value_head.state_dict().items():
        assert torch.equal(other.value_head.state_dict()[name], value), name
