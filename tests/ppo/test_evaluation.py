"""Soft against hard during a run: what is kept, and whether the reward rises while the judge falls."""

import logging

import pytest
import torch
from datasets import Dataset
from ppo.runs import EASY, EVERY_STEP, KEEP_ALL, Course, logged, not_ascii, prefix_of, root_of, saved_prefix, varied
from safetensors.torch import load_file
from tiny import sample_context
from transformers import TrainerCallback

from h2s import InputError
from h2s.ppo.value_head import VALUE_HEAD_FILE
from h2s.report.comparison import metric_names


def kept_steps(trainer):
    """The checkpoints whose adapter is the one at the run's root."""
    root = root_of(trainer)
    folders = sorted(root.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    return [int(f.name.rsplit("-", 1)[1]) for f in folders if torch.equal(saved_prefix(f), saved_prefix(root))]


def test_best_adapter_is_kept_and_never_the_starting_one(build):
    """Every iteration is worse than the hard prompt; the least bad one is kept, at the root and in the policy."""
    trainer = build(Course([-5.0, -1.0, -3.0, -2.0]), max_steps=4, **EVERY_STEP, **KEEP_ALL)
    root, start = root_of(trainer), prefix_of(trainer)
    trainer.train()
    saved = {n: saved_prefix(root / f"checkpoint-{n}") for n in range(1, 5)}
    assert logged(trainer, "eval_reward_difference") == pytest.approx([-5, -1, -3, -2])
    assert kept_steps(trainer) == [2]
    assert not any(torch.equal(p, start) for p in saved.values())
    heads = {n: load_file(root / f"checkpoint-{n}" / VALUE_HEAD_FILE) for n in (2, 4)}
    assert torch.equal(load_file(root / VALUE_HEAD_FILE)["dense.weight"], heads[2]["dense.weight"])
    assert not torch.equal(heads[2]["dense.weight"], heads[4]["dense.weight"])
    assert torch.equal(prefix_of(trainer), saved[2]) and not torch.equal(saved[2], saved[4])
    assert torch.equal(trainer.value_head.dense.weight, heads[2]["dense.weight"])


def test_a_smaller_metric_may_be_the_better_one(build):
    course = Course([-5.0, -1.0, -7.0])
    trainer = build(course, max_steps=3, greater_is_better=False, **EVERY_STEP, **KEEP_ALL)
    trainer.train()
    assert kept_steps(trainer) == [3]


def test_an_evaluation_before_training_is_no_candidate(build):
    """The starting prefix is as good as the hard prompt, and all that follows is worse."""
    rooted = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            rooted.append((root_of(trainer) / "adapter_model.safetensors").exists())

    trainer = build(Course([0.0, -4.0]), callbacks=[Watch()], max_steps=1, eval_on_start=True, **EVERY_STEP)
    start = prefix_of(trainer)
    trainer.train()
    assert logged(trainer, "eval_reward_difference") == pytest.approx([0, -4]) and rooted == [False]
    assert torch.equal(saved_prefix(root_of(trainer)), prefix_of(trainer))
    assert not torch.equal(prefix_of(trainer), start)


def test_last_step_is_evaluated(build):
    trainer = build(max_steps=5, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_reward_difference" in line] == [2, 4, 5]


@pytest.mark.parametrize("eval_dataset", [None, "given"])
def test_without_evaluations_the_last_adapter_is_kept(build, eval_dataset):
    """`eval_strategy` is "no" by default, with or without held-out contexts."""
    given = {"eval_dataset": None} if eval_dataset is None else {}
    trainer = build(**given, **KEEP_ALL)
    trainer.evaluate = None
    trainer.train()
    root = root_of(trainer)
    assert kept_steps(trainer) == [2]
    assert torch.equal(prefix_of(trainer), saved_prefix(root))
    assert (root / VALUE_HEAD_FILE).is_file() and (root / "README.md").is_file() and (root / "h2s.json").is_file()
    assert not list(root.rglob("training_args.bin"))


def test_evaluation_does_not_touch_what_is_sampled_next(build):
    """A run that evaluates comes to the same bytes as one that does not."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    for folder, evaluations in (("with", EVERY_STEP), ("without", {})):
        trainer = build(folder=folder, **settings, **evaluations)
        trainer.train()
    last = [saved_prefix(root_of(trainer).parent / folder / "checkpoint-3") for folder in ("with", "without")]
    assert torch.equal(*last)


def test_load_best_model_at_end_changes_nothing(build):
    """It is always loaded."""
    trainer = build(Course([-1.0, -3.0]), load_best_model_at_end=True, **EVERY_STEP, **KEEP_ALL)
    trainer.train()
    assert kept_steps(trainer) == [1]
    assert torch.equal(prefix_of(trainer), saved_prefix(root_of(trainer)))


def test_compare_is_soft_against_hard_on_other_contexts(build):
    """The table of an evaluation, scored by reward and judge; with the hard prompt's own prefix all is equal."""
    trainer = build(judge=not_ascii)
    table = trainer.compare(trainer.train_dataset)
    assert len(table) == 12 and table["prompt"].tolist() == trainer.train_dataset["prompt"][:]
    assert table["soft"].tolist() == table["hard"].tolist()
    assert table["soft_reward"].tolist() == pytest.approx(varied([[{"content": t}] for t in table["soft"]]))
    assert table["hard_judge"].tolist() == pytest.approx(not_ascii([[{"content": t}] for t in table["hard"]]))


# A reward that rises while the judge falls


@pytest.fixture
def warnings_of():
    """What is logged from h2s as a warning, wherever a run has turned the logger's propagation.

    But for the first evaluation's, that the tiny policy's replies are all cut.
    """
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: "No fair match" not in record.getMessage())
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("h2s").addHandler(handler)
    yield lines
    logging.getLogger("h2s").removeHandler(handler)


def train_and_watch(trainer):
    """The metrics that each evaluation returns."""
    evaluate, returned = trainer.evaluate, []
    trainer.evaluate = lambda *args, **kwargs: returned.append(evaluate(*args, **kwargs)) or returned[-1]
    trainer.train()
    return returned


@pytest.mark.parametrize("saved", [KEEP_ALL, {}])
def test_over_optimisation_is_said_and_the_judges_favourite_kept(build, warnings_of, saved):
    """Said in words, returned, and in the history, which TensorBoard and trainer_state.json show."""
    judge = Course([0.5, 2.0, 1.0, -1.0])
    trainer = build(Course([1.0, 2.0, 3.0, 4.0]), judge=judge, max_steps=4, **EVERY_STEP, **saved)
    returned = train_and_watch(trainer)
    assert [m["eval_over_optimised"] for m in returned] == [0, 0, 1, 1] == logged(trainer, "eval_over_optimised")
    start = "over-optimisation: since step 2 the reward rose from +2.000 to "
    assert warnings_of == [
        start + "+3.000 and the judge fell from +2.000 [+2.000, +2.000] to +1.000 [+1.000, +1.000];"
        " the adapter of step 2 is kept",
        start + "+4.000 and the judge fell from +2.000 [+2.000, +2.000] to -1.000 [-1.000, -1.000];"
        " the adapter of step 2 is kept",
    ]
    assert kept_steps(trainer) == [2] * bool(saved)


def test_over_optimisation_happens(build, warnings_of):
    """Nothing stubbed: PPO raises what the judge dislikes."""
    trainer = build(
        not_ascii,
        judge=lambda completions, **kwargs: [-score for score in not_ascii(completions)],
        max_steps=16,
        contexts=[1] * 16,
        eval_strategy="steps",
        eval_steps=4,
        **EASY,
        **KEEP_ALL | {"save_steps": 4},
    )
    trainer.eval_dataset = trainer.train_dataset  # what is learnt on one context does not carry over to others here
    returned = train_and_watch(trainer)
    rewards = logged(trainer, "eval_reward_difference")
    assert logged(trainer, "eval_judge_difference") == pytest.approx([-r for r in rewards])
    assert rewards[-1] > min(rewards) + 0.05, rewards
    assert returned[-1]["eval_over_optimised"] == 1
    best = 4 * (1 + rewards.index(min(rewards)))
    assert warnings_of and f"the adapter of step {best} is kept" in warnings_of[-1]
    assert kept_steps(trainer) == [best] != [16]


@pytest.mark.parametrize("judge", [None, [0.5, 1.0, 2.0]])
def test_a_run_that_goes_well_says_nothing(build, warnings_of, judge):
    trainer = build(Course([1.0, 2.0, 3.0]), judge=judge and Course(judge), max_steps=3, **EVERY_STEP)
    returned = train_and_watch(trainer)
    assert warnings_of == []
    assert [m.get("eval_over_optimised") for m in returned] == [None if judge is None else 0] * 3


def test_the_adapter_that_is_said_to_be_kept_is(build, warnings_of):
    """The judge liked the starting prefix best; it is no candidate."""
    settings = {"eval_on_start": True, **EVERY_STEP, **KEEP_ALL}
    trainer = build(Course([0.0, 1.0, 2.0]), judge=Course([0.0, -1.0, -2.0]), **settings)
    trainer.train()
    assert kept_steps(trainer) == [1]
    assert "the adapter of step 1 is kept" in warnings_of[-1]


def test_the_adapter_that_is_said_to_be_kept_is_the_best_by_what_was_asked_for(build, warnings_of):
    settings = {"metric_for_best_model": "kl", **EVERY_STEP, **KEEP_ALL}
    trainer = build(Course([1.0, 2.0]), judge=Course([-1.0, -2.0]), **settings)
    trainer.train()
    kls = logged(trainer, "eval_kl")
    best = 1 + kls.index(max(kls))
    assert kept_steps(trainer) == [best]
    assert f"the adapter of step {best} is kept" in warnings_of[-1] and len(warnings_of) == 2


# Which step is kept, in words


BEST = "Step {} of {} is kept, the best one, chosen by {} on 5 contexts."
NEAREST = (
    "No step beat the hard prompt on what selects ({2} on 5 contexts): step {0} of {1}, which came nearest, is kept."
)


@pytest.mark.parametrize(
    ("given", "judge", "settings", "said"),
    [
        ([1.0, 2.0, 0.5], None, {}, BEST.format(2, 3, "the reward")),
        ([9.0, 9.0, 9.5], [-1.0, 0.5, 0.0], {}, BEST.format(2, 3, "the judge")),
        ([9.0, 9.0, 9.5], [-1.0, -0.5, -2.0], {}, NEAREST.format(2, 3, "the judge")),
        # As good as the hard prompt is not better.
        ([0.0, -1.0, -1.0], None, {}, NEAREST.format(1, 3, "the reward")),
        ([0.0, 1.0, 2.0], None, {"metric_for_best_model": "eval_reward_win"}, BEST.format(2, 3, "reward_win")),
        (
            [2.0, 1.0, 3.0],
            None,
            {"metric_for_best_model": "soft_reward", "greater_is_better": False},
            NEAREST.format(2, 3, "soft_reward"),
        ),
    ],
)
def test_kept_step_is_named_and_best_only_where_it_beat_the_hard_prompt(build, given, judge, settings, said):
    trainer = build(Course(given), judge=judge and Course(judge), max_steps=3, **EVERY_STEP, **settings)
    trainer.train()
    assert trainer.kept_step() == said and ("best" in said) == said.startswith("Step")


def test_kept_step_without_evaluations(build):
    trainer = build()
    trainer.train()
    assert trainer.kept_step() == "Step 2 of 2, the last, is kept: none was evaluated."


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ([5.0, 1.0], [2.0, 3.0], BEST.format(1, 4, "the reward")),
        ([-5.0, -6.0], [-7.0, 3.0], BEST.format(4, 4, "the reward")),
        ([-1.0, -6.0], [-7.0, -3.0], NEAREST.format(1, 4, "the reward")),
    ],
)
def test_kept_step_of_a_resumed_run_may_lie_before_its_checkpoint(build, first, then, said):
    """What it beat then is known from the checkpoint's log."""
    settings = {**EVERY_STEP, **KEEP_ALL}
    build(Course(first), max_steps=2, **settings).train()
    again = build(Course(then), max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.kept_step() == said


def test_evaluations_after_training_do_not_change_what_is_said(build):
    trainer = build(Course([1.0, 2.0, -9.0]), **EVERY_STEP)
    trainer.train()
    trainer.evaluate()
    assert trainer.kept_step() == BEST.format(2, 2, "the reward")


# More room than in training


def test_evaluation_may_use_a_larger_cap_than_training(build):
    """Training's replies keep theirs."""
    trainer = build(eval_max_completion_length=20, **EVERY_STEP)
    lengths = {"train": [], "eval": []}
    draw = trainer.policy.draw

    def watched(prompts, sampling, **kwargs):
        lengths["eval" if sampling is trainer.compared_sampling else "train"].append(sampling.max_completion_length)
        return draw(prompts, sampling, **kwargs)

    trainer.policy.draw = watched
    trainer.train()
    assert set(lengths["train"]) == {6} and set(lengths["eval"]) == {20}
    assert max(logged(trainer, "completions/mean_length")) <= 6 < min(logged(trainer, "eval_hard_tokens"))
    assert trainer.compare(trainer.eval_dataset)["hard_tokens"].max() > 6


def test_contexts_leave_room_for_the_larger_cap(build):
    """Those that are compared; the others need room for training's alone."""
    texts = [sample_context(100), [{"role": "user", "content": "tea " * 300}]]
    long = Dataset.from_dict({"prompt": texts})
    build(train_dataset=Dataset.from_dict({"prompt": texts * 3}), eval_max_completion_length=900)
    with pytest.raises(InputError, match="context 2 is"):
        build(eval_dataset=long, eval_max_completion_length=900)


def test_a_cap_that_cuts_is_told_of_once_at_the_first_evaluation(build, caplog):
    trainer = build(max_steps=3, **EVERY_STEP)
    with caplog.at_level(logging.WARNING, "h2s"):
        trainer.train()
    lines = [line for line in caplog.messages if "No fair match" in line]
    assert len(lines) == 1 and "the cap of 6 tokens cut 100% of the hard prompt's replies" in lines[0]


# What selects


@pytest.mark.parametrize("judge", [None, varied])
def test_what_can_select_is_what_an_evaluation_measures(build, judge):
    """With and without `eval_`; what is said besides, whether it is over-optimised, selects nothing."""
    trainer = build(judge=judge)
    metrics = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"over_optimised"}
    assert set(metric_names(trainer.scorers)) == metrics
    for name in ("soft_tokens", "eval_reward_win", "judge_win" if judge else "reward_tie"):
        build(eval_strategy="steps", metric_for_best_model=name, judge=judge)


@pytest.mark.parametrize(
    ("judge", "asked", "selects"),
    [
        (None, None, "reward_difference"),
        (varied, None, "judge_difference"),
        (varied, "reward_difference", "reward_difference"),
        (varied, "eval_kl", "eval_kl"),
    ],
)
def test_the_judge_selects_unless_something_else_is_asked_for(build, judge, asked, selects):
    trainer = build(judge=judge, metric_for_best_model=asked, **EVERY_STEP)
    assert trainer.args.metric_for_best_model == selects


def test_what_selects_does_select(build):
    """Reward and judge disagree about the best of three steps."""
    kept = {}
    for asked in (None, "reward_difference"):
        judge, folder = Course([1.0, 3.0, 2.0]), str(asked)
        trainer = build(
            Course([3.0, 1.0, 2.0]),
            judge=judge,
            folder=folder,
            max_steps=3,
            metric_for_best_model=asked,
            **EVERY_STEP,
            **KEEP_ALL,
        )
        trainer.train()
        kept[asked] = kept_steps(trainer)
    assert kept == {None: [2], "reward_difference": [1]}


def test_contexts_may_be_given_to_evaluate_and_compare(build):
    """Also as text; without any it is said what is missing."""
    trainer = build(eval_dataset=None)
    texts = Dataset.from_dict({"prompt": ["walk number 1", "tea"]})
    messages = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts["prompt"]]})
    assert trainer.evaluate(texts) == trainer.evaluate(messages)
    assert trainer.compare(texts)["soft"].tolist() == trainer.compare(messages)["soft"].tolist()
    with pytest.raises(
        InputError, match=r"eval_dataset must be a datasets\.Dataset with a column prompt, got NoneType"
    ):
        trainer.evaluate()
