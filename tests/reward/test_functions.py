import asyncio
import functools
import math
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import build_reward_model
from transformers import TrainerState
from trl import RLOOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from h2s.errors import InputError
from h2s.reward.functions import RewardFunctions, load_reward_function, open_scorers, reward_columns

PROMPTS = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "you there"}]]
REPLIES = ["how was it?", "I see."]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The current folder is put on the path, so a copy of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])


def returning(scores):
    return lambda **given: scores


def length(completions, **given):
    return [float(len(c[0]["content"])) for c in completions]


async def length_later(completions, **given):
    await asyncio.sleep(0)
    return length(completions)


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **given):
        return [self.factor * score for score in length(completions)]


class ScaleLater(Scale):
    async def __call__(self, completions, **given):
        await asyncio.sleep(0)
        return super().__call__(completions)


# How a reward is called


BATCH = {
    "prompt": PROMPTS,
    "prompt_ids": [[6, 7], [8]],  # h2s's own, derived from the prompt
    "answer": ["yes", None],
    "level": [3, 4],
}


def by_trl(function, state, log_extra, log_metric, ids):
    """What TRL's own trainer makes of one reward on the batch, (N, 1)."""
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(report_to=[]),
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["it"],
        state=state,
        _log_completion_extra=log_extra,
        _log_metric=log_metric,
    )
    rows = [{k: v[i] for k, v in BATCH.items() if k != "prompt_ids"} for i in range(2)]
    completions = [[{"role": "assistant", "content": reply}] for reply in REPLIES]
    return RLOOTrainer._calculate_rewards(trainer, rows, PROMPTS, completions, ids)


@pytest.mark.parametrize("rows", [BATCH, Dataset.from_dict(BATCH)], ids=["batch", "dataset"])
def test_a_reward_is_given_what_trl_gives(rows):
    """Names and values, by TRL's own method."""
    calls, given = [], (TrainerState(global_step=7), lambda column, values: None, lambda name, value: None)
    ids = [[9, 5], [10, 11]]

    def reward(**arguments):
        calls.append(arguments)
        return [1.5, None]

    ours = RewardFunctions(reward)(rows["prompt"], REPLIES, ids, reward_columns(rows), *given)
    theirs = by_trl(reward, *given, ids)
    assert calls[0] == calls[1]
    assert set(calls[0]) == {
        *("prompts", "completions", "completion_ids", "answer", "level"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert calls[0]["trainer_state"] is given[0] and calls[0]["log_extra"] is given[1]
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.dtype == torch.float32


def test_what_is_not_given_is_empty():
    """Outside of a training a reward that asks for all of it still runs."""
    seen = {}

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        log_extra("a", [1, 2])
        log_metric("b", 1.0)
        seen.update(completion_ids=completion_ids, step=trainer_state.global_step)
        return [0, 0]

    assert RewardFunctions(reward)(PROMPTS, REPLIES).tolist() == [[0], [0]]
    assert seen == {"completion_ids": [[], []], "step": 0}


def test_what_one_reward_edits_does_not_reach_another():
    """Nor the caller: each has its own copy, down to the messages."""

    def edits(prompts, completions, completion_ids, level, **given):
        prompts[0][0]["content"] = "edited"
        completions[1][0]["content"] = "edited"
        for held in (completion_ids[0], level):
            held.clear()
        return [0, 0]

    seen = {}
    prompts, ids, columns = [[dict(m) for m in p] for p in PROMPTS], [[9], [10]], {"level": [3, 4]}
    RewardFunctions([edits, lambda **given: seen.update(given) or [1, 2], edits])(prompts, REPLIES, ids, columns)
    assert prompts == seen["prompts"] == PROMPTS
    assert [c[0]["content"] for c in seen["completions"]] == REPLIES
    assert ids == seen["completion_ids"] == [[9], [10]] and columns["level"] == seen["level"] == [3, 4]


# What it may return


@pytest.mark.parametrize(
    "scores", [torch.tensor([1.5, 2.0]), np.array([1.5, 2.0]), (1.5, 2), iter([1.5, 2]), [np.float64(1.5), True + 1]]
)
def test_whatever_holds_numbers_is_taken(scores):
    values = RewardFunctions(returning(scores))(PROMPTS, REPLIES)
    assert values.tolist() == [[1.5], [2.0]] and values.dtype == torch.float32


def test_none_leaves_a_reply_out_and_what_is_no_number_is_infinite():
    """A NaN of the user's own is a fault, and must not pass for None."""
    rewards = RewardFunctions([returning([None, 1.0]), returning([math.nan, -math.inf])])
    first, second = rewards(PROMPTS, REPLIES).T.tolist()
    assert math.isnan(first[0]) and first[1] == 1.0
    assert second == [math.inf, math.inf]


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 3])
@pytest.mark.parametrize("later", [False, True])
def test_another_number_of_scores_is_refused(scores, later):
    async def wait(**given):
        return scores

    def short(**given):
        return scores

    message = f"the reward {'wait' if later else 'short'} returned {len(scores)} scores for 2 completions"
    with pytest.raises(ValueError, match=message):
        RewardFunctions([length, wait if later else short])(PROMPTS, REPLIES)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("weights", "values", "total"),
    [
        (None, [2.0, 3.0], 5.0),
        ([0.5, -1.0], [2.0, 3.0], -2.0),
        ([0.5, -1.0], [NAN, 3.0], -3.0),
        ([0.5, -1.0], [2.0, NAN], 1.0),
        ([0.5, -1.0], [NAN, NAN], NAN),
        ([0.0, 1.0], [2.0, NAN], 0.0),
        # A fault of one reward is one of the sum, whatever the others and the weights make of it.
        (None, [INF, NAN], INF),
        ([1.0, -1.0], [INF, INF], INF),
        ([0.0, 1.0], [INF, 1.0], INF),
    ],
)
def test_weighted_sum_by_hand(weights, values, total):
    rewards = RewardFunctions([length, length_later], weights)
    assert rewards.total(torch.tensor([values, [1.0, 1.0]])).tolist() == pytest.approx(
        [total, sum(weights or [1, 1])], nan_ok=True
    )


# What a reward may be


def test_names_are_trls_and_numbered_where_alike(reward_adapter, bert_folder):
    """And all kinds stand side by side, each in its column."""
    model = build_reward_model(bert_folder)
    given = [
        length,
        functools.partial(length, factor=2),
        Scale(2),
        functools.partial(Scale(3), more=1),
        length_later,
        functools.partial(length_later, more=1),
        ScaleLater(4),
        str(reward_adapter),
        reward_adapter,
        model,
        think_format_reward,
        get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2),
    ]
    rewards = RewardFunctions(given)
    assert rewards.names == [
        *("length_1", "length_2", "Scale_1", "Scale_2", "length_later_1", "length_later_2", "ScaleLater"),
        *("reward_1", "reward_2", "reward_model", "think_format_reward", "soft_overlong_punishment_reward"),
    ]
    assert rewards.weights.tolist() == [1.0] * len(given)
    replies = ["<think>\nof it\n</think>\nSo.", "So."]
    values = rewards(PROMPTS, replies, [[7] * 3, [7] * 9])
    sizes = torch.tensor([[float(len(reply))] for reply in replies])
    torch.testing.assert_close(values[:, :7], sizes * torch.tensor([1.0, 1, 2, 3, 1, 1, 4]))
    scores = model.score(PROMPTS, replies)  # the adapter of the fixture was made in the same way
    for column in (7, 8, 9):
        torch.testing.assert_close(values[:, column], scores)
    # Of TRL's own: the format that it asks for; 3 tokens are 1 into the cache of 2, and 9 are over the limit.
    assert values[:, 10].tolist() == [1.0, 0.0] and values[:, 11].tolist() == [-0.5, -1.0]


def test_one_reward_needs_no_list_and_given_ones_are_taken_over():
    once = RewardFunctions(Scale(2), [0.5])
    again = RewardFunctions(once, [3.0])
    assert again.names == ["Scale"] and again.functions == once.functions and again.weights.tolist() == [3.0]
    assert RewardFunctions((length, Scale(2)))(PROMPTS, REPLIES).tolist() == [[11.0, 22.0], [6.0, 12.0]]


def test_adapters_load_once_and_at_the_first_call(reward_adapter):
    rewards = RewardFunctions([length, reward_adapter])
    assert rewards.functions[1] == str(reward_adapter) and rewards.cuts() == Counter()
    first = rewards([[{"role": "user", "content": "walk " * 200}]], ["tea"])
    loaded = rewards.functions[1]
    assert rewards.cuts() == {"context": 1}
    rewards([[{"role": "user", "content": "walk"}]], ["tea " * 200])
    assert rewards.functions[1] is loaded
    # Nothing is left of the second context, which is a cut too.
    assert first.shape == (1, 2) and rewards.cuts() == {"context": 2, "response": 1}


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        ([], None, "expected at least one reward, got an empty list"),
        (3, None, "a reward must be a function, a RewardModel or an adapter, got 3"),
        ([length, None], None, "got None"),
        ({"length": length}, None, "a reward must be a function"),
        (torch.nn.Linear(1, 1), None, "got a Linear"),  # it is callable, and would be called in vain
        (length, [1.0, 2.0], "reward_weights must hold one weight a reward, got 2 for 1"),
        ([length, length], [], "got 0 for 2"),
        ("no/such/folder", None, "no such adapter folder: no/such/folder"),
        (".", None, "is not a reward adapter made by h2s: there is no adapter_config.json"),
    ],
)
def test_what_is_no_reward_is_refused_before_anything_loads(given, weights, message):
    with pytest.raises(InputError, match=message) as caught:
        RewardFunctions(given, weights)
    assert "\n" not in str(caught.value)


def test_policy_adapter_is_no_reward(policy_adapter):
    with pytest.raises(InputError, match=r"is not a reward adapter made by h2s: it is a .*PREFIX_TUNING adapter for"):
        RewardFunctions([length, policy_adapter])


# Rewards that wait


def test_async_rewards_wait_together():
    """Each for the other: one after the other they would wait for ever. Their client may be bound to their loop."""
    arrived, loops = [], []

    async def meets(completions, **given):
        arrived.append(None)
        loops.append(asyncio.get_running_loop())
        async with asyncio.timeout(20):
            while len(arrived) % 2:
                await asyncio.sleep(0.001)
        return length(completions)

    rewards = RewardFunctions([meets, Scale(2), meets])
    for _ in range(2):
        assert rewards(PROMPTS, REPLIES).tolist() == [[11.0, 22.0, 11.0], [6.0, 12.0, 6.0]]
    assert len(loops) == 4 and len(set(loops)) == 1


@pytest.mark.parametrize("reward", [length_later, ScaleLater(1), functools.partial(ScaleLater(1))])
def test_async_rewards_inside_a_running_loop(reward):
    """As in a notebook, whose cells run in one."""
    rewards = RewardFunctions(reward)

    async def cell():
        return rewards(PROMPTS, REPLIES).tolist()

    assert asyncio.run(cell()) == rewards(PROMPTS, REPLIES).tolist() == [[11.0], [6.0]]


def test_error_of_an_async_reward_is_the_callers():
    async def fails(**given):
        raise KeyError("score")

    with pytest.raises(KeyError, match="score"):
        RewardFunctions([length_later, fails])(PROMPTS, REPLIES)


def test_without_async_rewards_there_is_no_thread():
    before = threading.active_count()
    RewardFunctions([length, Scale(2)])(PROMPTS, REPLIES)
    assert threading.active_count() == before


# By name


def test_scorers_by_name(reward_adapter, policy_adapter, bert_folder, tmp_path):
    build_reward_model(bert_folder, seed=1).save_pretrained(tmp_path / "judge")
    assert open_scorers() == {}
    scorers = open_scorers(str(reward_adapter), str(tmp_path / "judge"))
    assert {name: scorer.names for name, scorer in scorers.items()} == {"reward": ["reward"], "judge": ["judge"]}
    scorers = open_scorers(None, str(tmp_path / "judge"), "trl.rewards.think_format_reward")
    assert [(name, *scorer.names) for name, scorer in scorers.items()] == [
        ("reward", "think_format_reward"),
        ("judge", "judge"),
    ]
    for same in (str(reward_adapter), f"{reward_adapter}/../{reward_adapter.name}/"):
        for rewards in (str(reward_adapter), [str(tmp_path / "judge"), str(reward_adapter)]):
            with pytest.raises(InputError, match="judge_adapter and reward_adapter are the same"):
                open_scorers(rewards, same)
        with pytest.raises(InputError, match="reward_adapter names an adapter twice"):
            open_scorers([str(reward_adapter), same])
    with pytest.raises(InputError, match="at least one reward, got an empty list"):
        open_scorers([])
    with pytest.raises(InputError, match="is not a reward adapter"):
        open_scorers(str(reward_adapter), str(policy_adapter))


def test_several_reward_adapters_are_their_mean(loud_bert, tmp_path):
    folders = [str(tmp_path / name) for name in ("ann/likes", "ben/likes", "likes-too")]
    alone = []
    for seed, folder in enumerate(folders):
        model = build_reward_model(loud_bert, seed=seed)
        alone.append(model.score(PROMPTS, REPLIES).tolist())
        model.save_pretrained(folder)
    reward = open_scorers(folders)["reward"]
    assert reward.names == ["likes_1", "likes_2", "likes-too"]  # a column each in the log
    total = reward.total(reward(PROMPTS, REPLIES)).tolist()
    assert total == pytest.approx([sum(scores) / 3 for scores in zip(*alone, strict=True)], rel=1e-5)
    assert len({round(score, 4) for scores in alone for score in scores}) == 6


def test_what_rewards_have_seen(bert_folder, tmp_path):
    """Said by adapters before they load and after, by models, and by no function."""
    for name, seen in (("one", ["a" * 16, "b" * 16]), ("other", ["b" * 16, "c" * 16])):
        model = build_reward_model(bert_folder)
        model.seen = seen
        model.save_pretrained(tmp_path / name)
    rewards = RewardFunctions([length, str(tmp_path / "one"), model])
    for _ in range(2):
        assert rewards.seen == {"a" * 16, "b" * 16, "c" * 16}
        rewards.load()
    assert RewardFunctions(length).seen == set()


def test_function_of_the_users_folder(tmp_path):
    """Beside the recipe's call, without being installed; imported once for all."""
    (tmp_path / "h2s_test_rewards_own.py").write_text(
        "def words(prompts, completions, **kwargs):\n"
        "    return [len(p[-1]['content'].split()) - len(c[0]['content'].split())"
        " for p, c in zip(prompts, completions)]\n"
        "limit = 3\n"
    )
    reward = load_reward_function("h2s_test_rewards_own.words")
    assert RewardFunctions(reward)(PROMPTS, ["a b c", "d"]).tolist() == [[-2.0], [1.0]]
    with pytest.raises(InputError, match="int, not a function"):
        load_reward_function("h2s_test_rewards_own.limit")
    assert load_reward_function("h2s_test_rewards_own.words") is reward
    assert sys.path.count(str(tmp_path)) == 1


def test_function_of_a_folder(tmp_path):
    """Of any folder; where it is not found the line says where it was looked for."""
    for name in ("h2s_test_rewards_here", "there/h2s_test_rewards_there"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("def ones(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    for path in ("h2s_test_rewards_here.ones", "there/h2s_test_rewards_there.ones"):
        assert RewardFunctions(load_reward_function(path))(PROMPTS, ["a", "b"]).tolist() == [[1.0], [1.0]]
    words = (
        rf"no_such.ones cannot be imported: .*'no_such' \(looked for in {tmp_path}/there and among installed packages"
    )
    with pytest.raises(InputError, match=words):
        load_reward_function("there/no_such.ones")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "dotted path"),
        ("words", "dotted path"),
        (".words", "dotted path"),
        (".a.words", "dotted path"),
        ("no_such_module.words", "no_such_module"),
        ("trl.rewards.no_such_reward", "no_such_reward"),
        ("trl.no_such_module.words", "cannot be imported"),
        ("trl.rewards.", "cannot be imported"),
        ("trl..rewards", "cannot be imported"),
        ("my_rewards.py", "my_rewards"),
        ("folder/my_rewards.py", "cannot be imported"),
        ("os.path", "module, not a function"),
        ("os.sep", "str, not a function"),
    ],
)
def test_wrong_path_is_the_users(path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_reward_function(path)
    assert not path or path in str(caught.value)


def test_error_inside_the_users_module_is_theirs_to_see(tmp_path):
    """Not made one line of: its traceback shows where."""
    (tmp_path / "h2s_test_rewards_broken.py").write_text("words = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_reward_function("h2s_test_rewards_broken.words")


def test_rewards_keep_their_weights_unless_others_are_given():
    once = RewardFunctions([lambda **_: [1.0], lambda **_: [2.0]], weights=[2.0, 3.0])
    for weights, total in ((None, 2 * 1 + 3 * 2), ([1.0, 1.0], 1 + 2)):
        again = RewardFunctions(once, weights)
        assert again.total(again([[{"role": "user", "content": "a"}]], ["b"])).tolist() == [total]
