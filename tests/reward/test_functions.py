import sys

import numpy as np
import pytest
import torch

from h2s.errors import InputError
from h2s.reward.functions import load_reward_function, score_replies

PROMPTS = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "you there"}]]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The current folder is put on the path, so a copy of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])


def test_trls_own_reward_function_works():
    reward = load_reward_function("trl.rewards.think_format_reward")
    replies = ["<think>\nof it\n</think>\nSo.", "So."]
    scores = score_replies(reward, PROMPTS, replies)
    assert scores == [1.0, 0.0] and all(type(s) is float for s in scores)
    assert score_replies(reward, PROMPTS, replies[::-1]) == [0.0, 1.0]


def test_function_of_the_users_folder(tmp_path):
    """Beside the recipe's call, without being installed; imported once for all."""
    (tmp_path / "h2s_test_rewards_own.py").write_text(
        "def words(prompts, completions, **kwargs):\n"
        "    assert not kwargs\n"
        "    return [len(p[-1]['content'].split()) - len(c[0]['content'].split())"
        " for p, c in zip(prompts, completions)]\n"
        "limit = 3\n"
    )
    reward = load_reward_function("h2s_test_rewards_own.words")
    assert score_replies(reward, PROMPTS, ["a b c", "d"]) == [-2.0, 1.0]
    with pytest.raises(InputError, match="int, not a function"):
        load_reward_function("h2s_test_rewards_own.limit")
    assert load_reward_function("h2s_test_rewards_own.words") is reward
    assert sys.path.count(str(tmp_path)) == 1


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


def test_called_as_trl_calls():
    """By name, conversational; the reward may keep or change what it is given."""
    asked = {}

    def reward(**given):
        asked.update(given)
        given["prompts"].clear()
        return [1, 2]

    prompts = list(PROMPTS)
    score_replies(reward, prompts, ["a", "b"])
    assert set(asked) == {"prompts", "completions"} and len(prompts) == 2
    assert asked["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]


@pytest.mark.parametrize("scores", [torch.tensor([1.5, 2.0]), np.array([1.5, 2.0]), (1.5, 2), iter([1.5, 2])])
def test_whatever_holds_numbers_is_taken(scores):
    got = score_replies(lambda prompts, completions: scores, PROMPTS, ["a", "b"])
    assert got == [1.5, 2.0] and all(type(s) is float for s in got)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "0 scores for 2"), ([1.0], "1 scores for 2"), ([1.0] * 3, "3 scores for 2"), ([1.0, None], "None")],
)
def test_not_a_number_a_reply_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        score_replies(lambda prompts, completions: scores, PROMPTS, ["a", "b"])
