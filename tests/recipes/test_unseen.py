"""What is reported on was seen by none of the models, whatever the files and seeds; what was is set aside and counted.

One chain of runs, each with a split of its own: reward and judge of a sheet, a policy, a second round of it.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from tiny import contexts, sample_context

from h2s.data.datasets import load_contexts, load_preferences
from h2s.data.messages import conversation_id
from h2s.data.splits import conversations_in, split_by_conversation, split_for_models

SHORT = ["--per_device_train_batch_size", 4, "--max_completion_length", 4, "--report_to", "none", "--max_steps", 1,
         "--value_warmup_batches", 1]  # fmt: skip


def seen_by(folder: Path) -> set[str]:
    return set(json.loads((folder / "h2s.json").read_text(encoding="utf-8"))["seen"])


def later_turn(i: int) -> list[dict[str, str]]:
    """Another turn of the conversation of `sample_context(i)`, its text as another program spells it."""
    (first, *_) = sample_context(i)
    more = [{"role": "assistant", "content": "And then?"}, {"role": "user", "content": "Home."}]
    return [first | {"content": f" {first['content'].replace(' ', '  ')}\r\n"}, *more]


@pytest.fixture(scope="module")
def chain(recipes, gemma_folder, bert_folder, sheet_file, contexts_file, tmp_path_factory):
    """The folders of the runs, and the contexts of the second round: turns of old conversations, and new ones."""
    out = tmp_path_factory.mktemp("chain")

    def run(recipe, name, *flags):
        where = ["--output_dir", out, "--run_name", name]
        recipes[recipe].main([str(flag) for flag in [*flags, *where]])
        return out / name

    reward = run("train_reward", "reward", "--reward_model_name_or_path", bert_folder, "--path", sheet_file,
                 "--judge_share", 0.3, "--split_seed", 2, "--test_size", 0.4, "--max_steps", 1,
                 "--report_to", "none")  # fmt: skip
    scorers = ["--reward_adapter", reward, "--judge_adapter", reward / "judge"]
    policy = run("train_policy", "policy", "--model_name_or_path", gemma_folder, "--hard_prompt", "Be kind.", "--path",
                 contexts_file, "--test_size", 0.5, *scorers, *SHORT)  # fmt: skip
    turns = [{"context": later_turn(i)} for i in range(40)]
    new = [{"context": f"tea number {i}"} for i in range(40, 60)]
    second = contexts(out, turns + new)["path"]
    again = run("train_policy", "again", "--prefix_adapter", policy, "--path", second, "--test_size", 0.4,
                "--split_seed", 5, *scorers, *SHORT)  # fmt: skip
    return SimpleNamespace(run=run, reward=reward, policy=policy, again=again, second=second, scorers=scorers)


def test_reward_and_judge_list_what_trained_or_selected_them(chain, sheet_file):
    roles = split_for_models(load_preferences(str(sheet_file)), 2, 0.4, 0.3)
    for role, folder in (("reward", chain.reward), ("judge", chain.reward / "judge")):
        expected = conversations_in(roles[role]["train"], roles[role]["validation"])
        assert seen_by(folder) == set(expected) and 5 < len(expected) < 30
        assert all(re.fullmatch("[0-9a-f]{16}", conversation) for conversation in expected)


def test_a_policy_lists_what_trained_it_from_round_to_round(chain, contexts_file):
    """And what trained its reward and its judge, by which it came to be as it is."""
    scorers = seen_by(chain.reward) | seen_by(chain.reward / "judge")
    first = split_by_conversation(load_contexts(str(contexts_file)), 42, 0.5)
    second = split_by_conversation(load_contexts(chain.second), 5, 0.4)
    of_first = set(conversations_in(first["train"], first["validation"]))
    of_second = set(conversations_in(second["train"], second["validation"]))
    assert of_first - scorers and of_second - of_first - scorers
    assert seen_by(chain.policy) == scorers | of_first
    assert seen_by(chain.again) == scorers | of_first | of_second


def check_report(folder: Path, candidates: list[str], seen: dict[str, set[str]]) -> None:
    """The report tells how many of the candidates were set aside and by whom, and is of the others."""
    everything = set.union(*seen.values())
    unseen = [c for c in candidates if c not in everything]
    assert 0 < len(unseen) < len(candidates)
    counts = ", ".join(f"{name} {sum(c in of for c in candidates)}" for name, of in seen.items())
    aside = f"{len(candidates) - len(unseen)} of {len(candidates)} contexts are set aside"
    for file in ("README.md", "train.log"):
        text = (folder / file).read_text(encoding="utf-8")
        assert aside in text and f"trained or selected a model: {counts}." in text
    count = f"n = {len(unseen)} contexts of {len(set(unseen))} conversations."
    assert count in (folder / "README.md").read_text(encoding="utf-8")


def test_a_policy_is_reported_on_what_nothing_has_seen(chain, contexts_file):
    """The reward's split was another; in the second round there are turns of the first round's conversations."""
    seen = {"policy": set(), "reward": seen_by(chain.reward), "judge": seen_by(chain.reward / "judge")}
    first = split_by_conversation(load_contexts(str(contexts_file)), 42, 0.5)["test"]
    check_report(chain.policy, [conversation_id(p) for p in first["prompt"]], seen)
    second = split_by_conversation(load_contexts(chain.second), 5, 0.4)["test"]
    seen["policy"] = seen_by(chain.policy)
    check_report(chain.again, [conversation_id(p) for p in second["prompt"]], seen)


def test_dpo_learns_nothing_of_the_judges_conversations_and_is_reported_on_what_nothing_has_seen(chain, sheet_file):
    """From the first round's policy, by another split than the judge's."""
    folder = chain.run("train_dpo", "dpo", "--prefix_adapter", chain.policy, "--path", sheet_file, "--split_seed", 5,
                       "--judge_adapter", chain.reward / "judge", "--max_steps", 1, "--max_completion_length", 2,
                       "--report_to", "none")  # fmt: skip
    seen = {"policy": seen_by(chain.policy), "judge": seen_by(chain.reward / "judge")}
    parts = split_by_conversation(load_preferences(str(sheet_file)), 5, 0.2)
    learnt = set(conversations_in(parts["train"], parts["validation"]))
    assert learnt & seen["judge"] and seen_by(folder) == seen["policy"] | (learnt - seen["judge"])
    candidates = [conversation_id(p) for p in parts["test"]["prompt"]]
    unseen = set(candidates) - set.union(*seen.values())
    pairs = pd.read_parquet(folder / "pairs.parquet")
    assert 0 < len(unseen) < len(set(candidates)) and set(pairs["conversation"]) == unseen
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"n = {len(unseen)} contexts of {len(unseen)} conversations." in text
    counts = ", ".join(f"{name} {sum(c in of for c in candidates)}" for name, of in seen.items())
    assert f"trained or selected a model: {counts}." in text and "Be kind." in text


@pytest.mark.parametrize("which", [["--split", "all"], ["--test_size", 0.5, "--split_seed", 1]], ids=str)
@pytest.mark.parametrize("scored", [True, False])
def test_compare_reports_on_what_nothing_has_seen(chain, scored, which):
    """Whatever its split; without the reward adapter too, since the policy knows what made it."""
    flags = ["--policy_adapter", chain.again, "--path", chain.second, "--max_completion_length", 2, "--best_of_n", 0]
    scorers = {"reward": chain.reward, "judge": chain.reward / "judge"} if scored else {}
    folder = chain.run("compare", f"{scored}{which[-1]}", *flags, *which, *(chain.scorers if scored else []))
    rows = load_contexts(chain.second)
    if "all" not in which:
        rows = split_by_conversation(rows, 1, 0.5)["test"]
    seen = {name: seen_by(adapter) for name, adapter in {"policy": chain.again, **scorers}.items()}
    check_report(folder, [conversation_id(p) for p in rows["prompt"]], seen)
    compared = pd.read_parquet(folder / "replies.parquet")
    assert not set(compared["conversation"]) & set.union(*seen.values())
    judged = pd.read_excel(folder / "blinded.xlsx")["context_messages"]
    to_judge = compared[compared["soft"] != compared["hard"]]
    in_the_sheet = compared if to_judge.empty else to_judge  # where all are identical they are shown
    assert [conversation_id(json.loads(cell)) for cell in judged] == in_the_sheet["conversation"].tolist()


def test_adapters_that_do_not_say_what_they_saw(chain, policy_adapter, reward_adapter, contexts_file, tmp_path):
    """Made before they did: what they saw cannot be set aside, and the report says so."""
    policy, reward = (shutil.copytree(a, tmp_path / a.name) for a in (policy_adapter, reward_adapter))
    fields = json.loads((policy / "h2s.json").read_text(encoding="utf-8"))
    del fields["seen"]
    (policy / "h2s.json").write_text(json.dumps(fields), encoding="utf-8")
    (reward / "h2s.json").unlink()
    adapters = ["--policy_adapter", policy, "--reward_adapter", reward]
    short = ["--max_completion_length", 2, "--best_of_n", 0]
    folder = chain.run("compare", "old", *adapters, "--path", contexts_file, "--split", "all", *short)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "n = 40 contexts" in text and "0 of 40 contexts are set aside" in text
    assert "policy unknown, reward unknown. Unknown: made when an adapter's h2s.json did not list them." in text
