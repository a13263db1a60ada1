"""Checkpoints of a PPO run, and going on from them to the same bytes."""

import logging
import shutil

import pytest
import torch
from ppo.runs import EVERY_STEP, KEEP_ALL, Course, contexts_of, logged, prefix_of, root_of, saved_prefix, texts, varied
from tiny import HARD_PROMPT

from h2s import InputError, PrefixTuningPolicyModel
from h2s.prefix.adapter import HARD, hard_prompt_active, soft_prefix
from h2s.run.whole_files import UNFINISHED

RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_mini_batches": 2, "contexts": range(20)}


@pytest.fixture
def said():
    """What h2s logs, wherever a run has turned the logger's propagation."""
    lines, logger = [], logging.getLogger("h2s")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def assert_same(one, other):
    """Prefix, value head and log to the last bit."""
    assert torch.equal(prefix_of(one), prefix_of(other))
    for name, value in one.value_head.state_dict().items():
        assert torch.equal(other.value_head.state_dict()[name], value), name
    for name in ("loss", "reward", "kl", "eval_reward_difference"):
        assert logged(one, name) == logged(other, name)


def test_loading_a_checkpoint_restores_prefix_and_value_head(build):
    trained = build(folder="trained", learning_rate=1e-2, save_strategy="steps", save_steps=2)
    trained.train()
    fresh = build(folder="fresh")
    assert not torch.equal(prefix_of(fresh), prefix_of(trained))
    fresh._load_from_checkpoint(str(root_of(trained) / "checkpoint-2"))
    assert torch.equal(prefix_of(fresh), prefix_of(trained))
    for name, value in trained.value_head.state_dict().items():
        assert torch.equal(fresh.value_head.state_dict()[name], value), name
    assert soft_prefix(fresh.policy.model).requires_grad
    # The reference stays the hard prompt.
    with hard_prompt_active(fresh.policy.model):
        assert fresh.policy.model.active_adapter == HARD
    hard = fresh.policy.model.prompt_encoder[HARD].embedding.weight
    assert torch.equal(hard, trained.policy.model.prompt_encoder[HARD].embedding.weight)
    assert not torch.equal(hard, prefix_of(fresh))


@pytest.mark.parametrize("settings", [{}, EVERY_STEP, {"num_generations": 2}])
def test_a_resumed_run_ends_in_the_same_bytes(build, settings):
    """As one that was ended after step 2: its checkpoint, and the best adapter of then at its root."""
    ended = build(folder="again", **RUN | {"max_steps": 2}, **settings)
    ended.train()
    whole = build(folder="whole", **RUN, **settings)
    whole.train()
    again = build(folder="again", **RUN, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_same(again, whole)
    assert torch.equal(saved_prefix(root_of(again)), saved_prefix(root_of(whole)))


def test_a_run_goes_on_from_a_folder(build):
    """Of another run; the older checkpoint, where there is a newer one."""
    whole = build(folder="whole", **RUN)
    whole.train()
    again = build(folder="again", **RUN)
    again.train(resume_from_checkpoint=root_of(whole) / "checkpoint-2")
    assert again.state.global_step == 4
    assert_same(again, whole)


def test_the_newest_complete_checkpoint_is_taken(build, said):
    """By number, not by name; what was being written when the run ended is deleted."""
    first = build(folder="run", max_steps=10, max_completion_length=2, num_ppo_epochs=1, **KEEP_ALL)
    first.train()
    unfinished = root_of(first) / UNFINISHED
    shutil.copytree(root_of(first) / "checkpoint-9", unfinished / "checkpoint-11")
    again = build(folder="run", max_steps=11, max_completion_length=2, num_ppo_epochs=1)
    again.train(resume_from_checkpoint=True)
    assert said[-1] == f"resuming from {root_of(first) / 'checkpoint-10'}"
    assert len(logged(again, "loss")) == 11 and not unfinished.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hard_prompt": "Ask."}, r"hard_prompt was \['You are .*'\] when .* now it is \['Ask.'\]: go on"),
        ({"reward_funcs": texts}, r"rewards was {'reward': \['varied times 1'\]} when .* \['texts times 1'\]}: go on"),
        ({"reward_weights": [2.0]}, r"rewards was .* now it is {'reward': \['varied times 2'\]}: go on"),
        ({"judge": varied}, "metric_for_best_model was reward_difference when .* now it is judge_difference: go on"),
        ({"rewarded": 100}, r"train_dataset was 20 rows \(\w+\) when the run of .* it is 20 rows \(\w+\): go on"),
        ({"seen": "0" * 16}, r"list of seen conversations was \d+ \(\w+\) when the run of .* now it is \d+ \("),
        ({"eval_max_completion_length": 40}, "eval_max_completion_length was 6 when the run of .* now it is 40: go on"),
        ({"temperature": 0.5}, "temperature was 1.0 when the run of .* now it is 0.5: go on with the former"),
        ({"scale_rewards": True}, "scale_rewards was False when the run of .* now it is True: go on"),
        ({"value_warmup_batches": 3}, "value_warmup_batches was 2 when the run of .* now it is 3: go on"),
        ({"contexts": range(1, 21)}, r"train_dataset was 20 rows \(\w+\) when the run of .* it is 20 rows \(\w+\): go"),
    ],
)
def test_what_would_make_it_another_run_is_refused(build, gemma_folder, changes, words):
    """Its reference, its rewards and their unit, its contexts: no shape would tell."""
    build(**RUN | {"max_steps": 2}).train()
    if "rewarded" in changes:  # a column that rewards are handed
        others = contexts_of(RUN["contexts"]).map(lambda row: {"number": row["number"] + changes["rewarded"]})
        changes = {"train_dataset": others}
    if changes.keys() & {"hard_prompt", "seen"}:
        policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), changes.get("hard_prompt", HARD_PROMPT))
        policy.prefix = policy.prefix.having_seen([changes["seen"]] if "seen" in changes else [])
        changes = {"model": policy}
    again = build(**RUN | changes)
    with pytest.raises(InputError, match=words):
        again.train(resume_from_checkpoint=True)


def test_without_a_checkpoint_it_starts_over_and_says_so(build, said):
    whole = build(folder="whole")
    whole.train()
    again = build(folder="again")
    again.train(resume_from_checkpoint=True)
    assert f"no checkpoint in {root_of(again)} yet: starting over" in said
    assert_same(again, whole)


def test_what_is_no_checkpoint_is_refused(build):
    trainer = build(**KEEP_ALL)
    trainer.train()
    root = root_of(trainer)
    for asked in ("latest", root, root / "checkpoint-3"):
        with pytest.raises(InputError, match="resume_from_checkpoint must be True or a checkpoint's folder, got "):
            trainer.train(resume_from_checkpoint=asked)


def test_the_kept_step_may_lie_before_the_checkpoint(build):
    """The best step is not judged anew: it is at the root."""
    settings = {**EVERY_STEP, **KEEP_ALL}
    first = build(Course([5.0, 1.0]), max_steps=2, **settings)
    first.train()
    again = build(Course([2.0, 3.0]), max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_global_step == 1
    best = saved_prefix(root_of(again) / "checkpoint-1")
    assert torch.equal(prefix_of(again), best) and torch.equal(saved_prefix(root_of(again)), best)
    assert not torch.equal(best, saved_prefix(root_of(again) / "checkpoint-4"))


def test_a_run_that_goes_on_elsewhere_chooses_anew(build, said):
    """The best adapter so far lies in the folder that it came from."""
    settings = {**EVERY_STEP, **KEEP_ALL}
    first = build(Course([5.0, 1.0]), folder="first", **settings)
    first.train()
    again = build(Course([3.0, 2.0]), folder="again", max_steps=4, **settings)
    again.train(resume_from_checkpoint=root_of(first) / "checkpoint-2")
    assert f"the best step so far is not in {root_of(again)}: choosing among those that follow" in said
    assert again.state.best_global_step == 3
    best = saved_prefix(root_of(again) / "checkpoint-3")
    assert torch.equal(prefix_of(again), best) and torch.equal(saved_prefix(root_of(again)), best)


def test_checkpoints_of_another_run_are_told_of(build, caplog):
    for expected in (0, 1):
        caplog.clear()
        build(max_steps=1, save_strategy="steps", save_steps=1).train()
        assert sum("holds checkpoints of another run" in line for line in caplog.messages) == expected
