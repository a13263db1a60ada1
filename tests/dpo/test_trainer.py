"""TRL's DPO on a prefix: what moves, what it is compared with, which step is kept, how it is resumed."""

import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from tiny import HARD_PROMPT

from h2s import InputError, PrefixTuningPolicyModel
from h2s.data.splits import conversations_in
from h2s.dpo.pairs import ImplicitReward
from h2s.prefix.adapter import fill_with_tokens, soft_prefix

EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
WEIGHTS = "adapter_model.safetensors"


def margins(trainer, pairs) -> torch.Tensor:
    reward = ImplicitReward(trainer.policy, trainer.args.beta)
    return reward.score(pairs["prompt"], pairs["chosen"]) - reward.score(pairs["prompt"], pairs["rejected"])


def test_the_loss_begins_at_ln_2_and_only_the_prefix_moves(build, policy, gemma_folder, pairs):
    trainer = build(max_steps=6, learning_rate=3e-2, logging_steps=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    before = soft_prefix(policy.model).detach().clone()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and min(losses[1:]) < 0.6
    assert (soft_prefix(policy.model) - before).abs().max() > 1e-2
    fresh = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="float32")
    for name, weight in fresh.model.get_base_model().named_parameters():
        assert torch.equal(weight, policy.model.get_base_model().get_parameter(name)), name
    assert torch.equal(soft_prefix(policy.model, "ref"), soft_prefix(fresh.model))
    assert not policy.model.training
    assert margins(trainer, pairs.select(range(24))).mean() > 0.3


def test_what_is_reported_is_what_is_trained(build, pairs):
    """TRL's metrics beside the implicit reward, of a prefix that has moved: the reference is the hard prompt still."""
    trainer = build(move=0.3)
    held_out = pairs.select(range(24, 32))
    measured = trainer.evaluate()
    found = margins(trainer, held_out)
    assert measured["eval_rewards/margins"] == pytest.approx(found.mean().item(), abs=1e-4)
    assert measured["eval_loss"] == pytest.approx(F.softplus(-found).mean().item(), abs=1e-4)
    assert found.abs().min() > 1e-3
    assert trainer.implicit_reward.beta == trainer.args.beta


def test_the_step_that_is_kept_is_the_least_loss(build, policy, tmp_path, pairs):
    trainer = build(**EVERY_TWO, max_steps=6, learning_rate=3e-2)
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert losses.keys() == {2, 4, 6} and trainer.state.best_global_step == best
    assert trainer.kept_step() == (
        f"Step {best} of 6 is kept, the best one by the loss on 8 pairs, {losses[best]:.4f} "
        "(the hard prompt's: ln 2 = 0.6931)."
    )
    root = load_file(tmp_path / "run" / WEIGHTS)["prompt_embeddings"]
    assert torch.equal(root, soft_prefix(policy.model))
    loss = F.softplus(-margins(trainer, pairs.select(range(24, 32)))).mean().item()
    assert loss == pytest.approx(losses[best], abs=1e-4)


def test_a_run_in_the_terminal(build, capsys):
    build(**EVERY_TWO, max_steps=2).train()
    lines = capsys.readouterr().out.splitlines()
    number = r"\d\.\d{4}"
    for line, words in zip(lines, (
        f"step 1 of 2: epoch 0.17, loss 0.693[12], rewards/accuracies {number}, [0-9:]+ left",
        f"step 2 of 2: epoch 0.33, loss {number}, rewards/accuracies {number}",
        f"step 2 of 2: epoch 0.33, eval_loss {number}, eval_rewards/accuracies {number}",
        "step 2 of 2: trained in 00:[0-9]+",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(words, line), line


def test_a_step_that_beat_nothing_is_called_so(build, pairs):
    exchanged = pairs.select(range(24, 32)).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    trainer = build(**EVERY_TWO, eval_dataset=exchanged, learning_rate=3e-2)
    trainer.train()
    assert trainer.kept_step().startswith("No step beat the hard prompt by the loss on 8 pairs, ")


def test_without_evaluation_the_last_step_is_kept(build, policy, tmp_path):
    trainer = build()
    trainer.train()
    assert trainer.kept_step() == "Step 4 of 4, the last, is kept: none was evaluated."
    assert torch.equal(load_file(tmp_path / "run" / WEIGHTS)["prompt_embeddings"], soft_prefix(policy.model))


def test_a_resumed_run_ends_in_the_same_bytes(build, policy, tmp_path):
    whole = build(**EVERY_TWO)
    whole.train()
    # TRL's count of tokens is that of the process.
    of_time = ("runtime", "per_second", "num_tokens")
    log = [{k: v for k, v in line.items() if not k.endswith(of_time)} for line in whole.state.log_history[:-1]]
    end = load_file(tmp_path / "run" / "checkpoint-4" / WEIGHTS)["prompt_embeddings"]
    kept = soft_prefix(policy.model).detach().clone()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    fill_with_tokens(policy.model, policy.prefix.token_ids)
    resumed = build(**EVERY_TWO)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(load_file(tmp_path / "run" / "checkpoint-4" / WEIGHTS)["prompt_embeddings"], end)
    assert torch.equal(soft_prefix(policy.model), kept)
    assert [{k: line[k] for k in was} for was, line in zip(log, resumed.state.log_history, strict=False)] == log
    with pytest.raises(InputError, match=r"beta was 0\.1 when the run of .* began, now it is 0\.2"):
        build(**EVERY_TWO, beta=0.2).train(resume_from_checkpoint=True)


def test_the_adapter_lists_what_it_learnt_from(build, policy, pairs):
    build()
    assert set(conversations_in(pairs.select(range(32)))) <= set(policy.prefix.seen)


def test_each_context_is_answered_once(build, pairs):
    trainer = build(max_completion_length=4)
    table = trainer.compare(pairs.select(range(8)), {})
    assert len(table) == 4 and table["soft"].tolist() == table["hard"].tolist()
    assert table["soft_tokens"].max() <= 4 and table["kl"].abs().max() < 1e-3


def test_an_adapter_by_its_folder(build, policy, tmp_path):
    policy.save_pretrained(tmp_path / "adapter")
    assert build(model=tmp_path / "adapter").policy.prefix.token_ids == policy.prefix.token_ids


@pytest.mark.parametrize("form", ["text", "parts"])
def test_judgements_of_another_form_give_the_tokens_that_are_answered_and_scored(form, build, pairs):
    """TRL alone would train plain text without turns, and print parts as they are."""
    some = pairs.select(range(4))
    text = [prompt[-1]["content"] for prompt in some["prompt"]]
    prompts = text if form == "text" else [[{"role": "user", "content": [{"type": "text", "text": t}]}] for t in text]
    replies = {side: [reply[-1]["content"] for reply in some[side]] for side in ("chosen", "rejected")}
    trainer = build(train_dataset=Dataset.from_dict({"prompt": prompts, **replies}), eval_dataset=None)
    asked = trainer.policy.encode([[{"role": "user", "content": t}] for t in text], 1)
    assert trainer.train_dataset["prompt_ids"][:] == asked
    said = trainer.processing_class.decode(trainer.train_dataset["chosen_ids"][0])
    assert said.startswith(replies["chosen"][0]) and "<end_of_turn>" in said
    measured = trainer.evaluate(Dataset.from_dict({"prompt": prompts, **replies}))
    assert measured["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_is_no_policy_or_no_data_is_refused(build, policy):
    with pytest.raises(InputError, match="peft_config is not taken"):
        build(peft_config="any")
    with pytest.raises(InputError, match=r"eval_dataset must be a datasets\.Dataset"):
        build(eval_dataset=Dataset.from_dict({"prompt": ["hi"]}))
    with pytest.raises(InputError, match="eval_strategy is steps, but there is no eval_dataset"):
        build(**EVERY_TWO, eval_dataset=None)
