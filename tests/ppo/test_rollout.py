"""The mini-batches of a rollout: what is said of their rows, and when they are drawn."""

import pytest
import torch
from ppo.runs import BATCH, inputs_of
from tiny import HARD_PROMPT

from h2s.ppo.rollout import Replies
from h2s.prefix.generation import Batch, Completions
from h2s.prefix.policy_model import PrefixTuningPolicyModel

COMPLETIONS = [[50, 60, 70, 5], [51, 5], [52, 61, 62], [53, 5], [54], [55, 60, 61, 62, 63, 5]]


def replies_of(trainer, known=None):
    """The completions above, as if they had been drawn; `known` is said of their tokens."""
    policy, count = trainer.policy, len(COMPLETIONS)
    batch = Batch.from_rows(policy.tokenizer, inputs_of(trainer)["prompt_ids"], COMPLETIONS, policy.model.device)
    drawn = Completions(COMPLETIONS, torch.zeros(count, 1), known)
    return Replies(batch, drawn, [""] * count, torch.zeros(count, 1), torch.zeros(count), torch.zeros(count).bool())


@pytest.mark.parametrize("mini_batches", [1, 4, 6])
def test_each_row_is_scored_as_alone(build, mini_batches):
    """The soft prompt by PEFT's own forward, the hard prompt as text: with the prefix's tokens before the row."""
    trainer = build(move=1.0, num_mini_batches=mini_batches)
    policy, prompts = trainer.policy, inputs_of(trainer)["prompt_ids"]
    parts = trainer._score(trainer.model, replies_of(trainer))
    rows = torch.cat([part.rows for part in parts]).tolist()
    assert len(parts) == mini_batches and sorted(rows) == list(range(BATCH)) != rows
    base, moved = policy.model.get_base_model(), 0.0
    for part in parts:
        assert part.batch.attention_mask.sum(1).max() == part.batch.input_ids.shape[1]  # no column of pads alone
        for i, row in enumerate(part.rows.tolist()):
            prompt, completion = prompts[row], COMPLETIONS[row]
            assert part.batch.input_ids[i][part.mask[i]].tolist() == completion
            with torch.no_grad():
                soft = policy.model(torch.tensor([prompt + completion])).logits[0]
                hard = base(torch.tensor([policy.prefix.token_ids + prompt + completion])).logits[0]
            at = torch.tensor(completion)[:, None]
            for found, logits in ((part.logps, soft), (part.ref_logps, hard)):
                lines = logits[-len(completion) - 1 : -1].log_softmax(-1)
                torch.testing.assert_close(found[i][part.mask[i]], lines.gather(1, at)[:, 0], rtol=0, atol=1e-4)
            moved = max(moved, (part.logps[i] - part.ref_logps[i]).abs().max().item())
        assert not part.logps[~part.mask].any() and not part.ref_logps[~part.mask].any()
    assert moved > 0.1 and policy.model.active_adapter == "default"


def test_what_is_known_from_the_sampling_is_not_scored_again(build):
    """Numbers that no model would say come back at their tokens."""
    trainer = build(num_mini_batches=3)
    known = torch.arange(6 * 7.0).view(6, 7) + 1, torch.arange(6 * 7.0).view(6, 7) + 100  # wider than the longest row
    for part in trainer._score(trainer.model, replies_of(trainer, known)):
        for i, row in enumerate(part.rows.tolist()):
            length = len(COMPLETIONS[row])
            assert part.logps[i][part.mask[i]].tolist() == [row * 7 + 1 + n for n in range(length)]
            assert part.entropy[i][part.mask[i]].tolist() == [row * 7 + 100 + n for n in range(length)]
        assert not part.logps[~part.mask].any() and not part.entropy[~part.mask].any()


@pytest.mark.parametrize("settings", [{"num_ppo_epochs": 1}, {"dtype": "bfloat16"}])
def test_it_is_scored_again_where_that_is_learnt_from_or_more_exact(build, gemma_folder, settings):
    """A graph is kept for the only update of an iteration."""
    dtype = settings.pop("dtype", "float32")
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype=dtype)
    trainer = build(model=policy, **settings)
    (part,) = trainer._score(trainer.model, replies_of(trainer, (torch.full((6, 6), 7.0), torch.full((6, 6), 7.0))))
    assert (part.logps[part.mask] < 0).all()
    assert part.logps.requires_grad == part.entropy.requires_grad == (dtype == "float32")
    assert not part.old_logps.requires_grad and not part.ref_logps.requires_grad
