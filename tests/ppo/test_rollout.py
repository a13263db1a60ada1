"""The mini-batches of a rollout: what is said of their rows, and when they are drawn."""

import pytest
import torch
from ppo.runs import BATCH, inputs_of

from h2s.prefix.generation import Batch

COMPLETIONS = [[50, 60, 70, 5], [51, 5], [52, 61, 62], [53, 5], [54], [55, 60, 61, 62, 63, 5]]


@pytest.mark.parametrize("mini_batches", [1, 4, 6])
def test_each_row_is_scored_as_alone(build, mini_batches):
    """The soft prompt by PEFT's own forward, the hard prompt as text: with the prefix's tokens before the row."""
    trainer = build(move=1.0, num_mini_batches=mini_batches)
    policy, prompts = trainer.policy, inputs_of(trainer)["prompt_ids"]
    batch = Batch.from_rows(policy.tokenizer, prompts, COMPLETIONS, policy.model.device)
    parts = trainer._score(trainer.model, batch, with_graph=False)
    rows = torch.cat([part.rows for part in parts]).tolist()
    assert len(parts) == mini_batches and sorted(rows) == list(range(BATCH)) != rows
    base, moved = policy.model.get_base_model(), 0.0
    for part in parts:
        assert part.batch.attention_mask.sum(1).max() == part.batch.input_ids.shape[1]  # no column of pads alone
        for i, row in enumerate(part.rows.tolist()):
            prompt, completion = prompts[row], COMPLETIONS[row]
            assert part.batch.input_ids[i][part.mask[i]].tolist() == completion
            with torch.no_grad():
                output = policy.model(torch.tensor([prompt + completion]), output_hidden_states=True)
                hard = base(torch.tensor([policy.prefix.token_ids + prompt + completion])).logits[0]
            at = torch.tensor(completion)[:, None]
            for found, logits in ((part.logps, output.logits[0]), (part.ref_logps, hard)):
                lines = logits[-len(completion) - 1 : -1].log_softmax(-1)
                torch.testing.assert_close(found[i][part.mask[i]], lines.gather(1, at)[:, 0], rtol=0, atol=1e-4)
            last = output.hidden_states[-1][0, len(prompt) - 1]  # at no pad, however long its neighbours
            torch.testing.assert_close(part.last_prompt[i], last, rtol=0, atol=1e-4)
            moved = max(moved, (part.logps[i] - part.ref_logps[i]).abs().max().item())
        assert not part.logps[~part.mask].any() and not part.ref_logps[~part.mask].any()
    assert moved > 0.1 and policy.model.active_adapter == "default"


def test_a_graph_is_kept_where_it_is_learnt_from(build):
    trainer = build()
    prompts = inputs_of(trainer)["prompt_ids"]
    batch = Batch.from_rows(trainer.policy.tokenizer, prompts, COMPLETIONS, trainer.policy.model.device)
    for kept in (False, True):
        (part,) = trainer._score(trainer.model, batch, with_graph=kept)
        assert part.logps.requires_grad == part.entropy.requires_grad == kept
        assert not part.old_logps.requires_grad and not part.ref_logps.requires_grad
        assert not part.last_prompt.requires_grad
