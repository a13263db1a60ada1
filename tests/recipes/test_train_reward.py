"""What `train_reward.py` does beside one training: folds and a judge; and `train_policy.py` with a reward of one's own.

One run with both is interrupted in its last fold and resumed; the tests look at what it left.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tiny import ROOT, sample_context
from transformers import AutoTokenizer

import h2s
from h2s.data.datasets import load_preferences
from h2s.data.messages import conversation_id
from h2s.data.splits import conversations_of, folds_by_conversation, share_with_judge, split_by_conversation
from h2s.reward.model import RewardModel
from h2s.reward.pairs import context_text

FOLDS, TEST_SIZE = 3, 0.3
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "h2s.json", "README.md"}
REPORT = {"accuracy.md", "accuracy.png", "pairs.parquet"}


def run(recipe: str, *argv: object) -> None:
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in argv])


def conversations(*parts):
    return {c for part in parts for c in conversations_of(part)}


@pytest.fixture(scope="module")
def resumed(bert_folder, sheet_file, tmp_path_factory):
    """The run's folder and what it trained before and after the interruption."""
    out = tmp_path_factory.mktemp("reward")
    flags = ["--reward_model_name_or_path", bert_folder, "--path", sheet_file, "--num_train_epochs", 1, "--max_tokens",
             90, "--test_size", TEST_SIZE, "--folds", FOLDS, "--judge_share", 0.5, "--report_to", "none",
             "--output_dir", out, "--run_name", "r"]  # fmt: skip
    folder, trained = out / "r", []

    class Watched(h2s.RewardModelTrainer):
        def __init__(self, **given):
            where = Path(given["args"].output_dir)
            parts = {"train": given["train_dataset"], "validation": given["eval_dataset"]}
            trained.append((str(where.relative_to(folder)), parts))
            if breaks and where == folder / "folds" / "3":
                raise RuntimeError("the power is gone")
            super().__init__(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h2s, "RewardModelTrainer", Watched)
        breaks = True
        with pytest.raises(SystemExit, match="1"):
            run("train_reward", *flags)
        first = {f.parent.name: f.read_bytes() for f in folder.glob("folds/*/pairs.parquet")}
        names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        before, trained[:] = list(trained), []
        breaks = False
        run("train_reward", *flags, "--resume_from_checkpoint", "true")
    return SimpleNamespace(folder=folder, before=before, after=trained, finished=first, names=names)


@pytest.fixture(scope="module")
def dataset(sheet_file):
    return load_preferences(str(sheet_file))


def test_a_finished_fold_is_not_trained_again(resumed):
    assert [name for name, _ in resumed.before] == ["folds/1", "folds/2", "folds/3"]
    # Of a finished fold its pairs are kept, and nothing else.
    assert {n for n in resumed.names if n.startswith("folds/")} == {f"folds/{i}/pairs.parquet" for i in (1, 2)}
    assert [name for name, _ in resumed.after] == ["folds/3", ".", "judge"]
    # The two files stand as they were, and the report holds them.
    for number, content in resumed.finished.items():
        assert (resumed.folder / "folds" / number / "pairs.parquet").read_bytes() == content
    pairs = pd.read_parquet(resumed.folder / "pairs.parquet")
    tables = [pd.read_parquet(resumed.folder / "folds" / str(i) / "pairs.parquet") for i in (1, 2, 3)]
    pd.testing.assert_frame_equal(pairs, pd.concat(tables, ignore_index=True))


def test_every_pair_is_judged_once_by_a_model_that_never_saw_it(resumed, dataset):
    pairs = pd.read_parquet(resumed.folder / "pairs.parquet")
    assert sorted(pairs["row"]) == sorted(dataset["row"]) and len(pairs) == 80
    by_row = {row["row"]: row for row in dataset}
    for row in pairs.itertuples():
        pair = by_row[row.row]
        assert (row.conversation, row.label) == (conversation_id(pair["prompt"]), pair["label"])
        assert row.length_difference == len(pair["chosen"][0]["content"]) - len(pair["rejected"][0]["content"])
    assert pairs["margin"].nunique() > 30
    # Each fold's model was trained on that fold's other conversations, and its table is of its own.
    folds = folds_by_conversation(dataset, FOLDS, 42)
    for number, (split, (_, parts)) in enumerate(zip(folds, [*resumed.before[:2], resumed.after[0]], strict=True), 1):
        table = pd.read_parquet(resumed.folder / "folds" / str(number) / "pairs.parquet")
        assert table["row"].tolist() == list(split["test"]["row"])
        assert not set(table["conversation"]) & conversations(parts["train"], parts["validation"])


def test_reward_and_judge_are_trained_on_different_conversations(resumed, dataset):
    (_, reward), (_, judge) = resumed.after[1:]
    expected = share_with_judge(split_by_conversation(dataset, 42, TEST_SIZE), 42, 0.5)
    for parts, right in zip((reward, judge), expected, strict=True):
        assert {n: list(p["row"]) for n, p in parts.items()} == {n: list(right[n]["row"]) for n in parts}
    assert not conversations(reward["train"], reward["validation"]) & conversations(judge["train"], judge["validation"])
    # The judge is reported on all that it never saw, the reward model's conversations among them.
    pairs = pd.read_parquet(resumed.folder / "judge" / "pairs.parquet")
    assert pairs["row"].tolist() == list(expected[1]["test"]["row"])
    assert conversations(reward["train"]) <= set(pairs["conversation"])
    weights = [load_file(resumed.folder / f / "adapter_model.safetensors")["prompt_embeddings"] for f in (".", "judge")]
    assert not torch.equal(*weights)


def test_files_of_reward_and_judge(resumed):
    folder = resumed.folder
    assert {f.name for f in folder.iterdir()} >= ADAPTER | REPORT | {"recipe.yaml", "train.log", "folds", "judge"}
    assert {f.name for f in (folder / "judge").iterdir()} >= ADAPTER | REPORT
    for file in (folder / "accuracy.png", folder / "judge" / "accuracy.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("training_args.bin"))
    content = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert (content["dataset"]["folds"], content["dataset"]["judge_share"]) == (FOLDS, 0.5)


def test_what_reward_and_judge_say_of_themselves(resumed):
    folds = "on all conversations, each by a model that never saw it (3 folds)"
    report = (resumed.folder / "accuracy.md").read_text(encoding="utf-8")
    assert folds in report and "n=80 (40 conversations)" in report
    verdict = report.splitlines()[2]
    assert verdict.startswith("Better than 'the longer wins': ") and verdict.endswith(", 80 pairs (40 conversations).")
    assert "\nOn average it gives the reply that it prefers " in report.split("\n\n")[1]
    # Each of the sheet's pairs stands there twice, its sides exchanged.
    assert "pairs judged more than once 40, of them contradictory 0" in report
    card = (resumed.folder / "README.md").read_text(encoding="utf-8")
    assert folds in card and "on conversations that this model never saw" in card
    assert card.split("# A reward model of human judgements\n\n")[1].startswith(f"{verdict}\n")
    judge = (resumed.folder / "judge" / "README.md").read_text(encoding="utf-8")
    assert "judge model" in judge and "folds" not in judge
    assert "on conversations that it never saw" in (resumed.folder / "judge" / "accuracy.md").read_text("utf-8")
    log = (resumed.folder / "train.log").read_text(encoding="utf-8")
    assert f"reward: {verdict}\n" in log
    for number in (1, 2, 3):
        assert f"fold {number} of 3: accuracy" in log


def test_judge_loads_with_plain_peft(resumed):
    folder = str(resumed.folder / "judge")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    encoded = AutoTokenizer.from_pretrained(folder)(context_text(sample_context(1)), "how was it?", return_tensors="pt")
    with torch.no_grad():
        score = plain(**encoded).logits.item()
    scores = [RewardModel.from_pretrained(f).score([sample_context(1)], ["how was it?"]).item()
              for f in (folder, str(resumed.folder))]  # fmt: skip
    assert scores[0] == pytest.approx(score, abs=1e-5) and abs(scores[0] - scores[1]) > 1e-4


def test_without_folds_and_judge(bert_folder, sheet_file, tmp_path, dataset):
    """The report is of the test part, by the model that is kept."""
    run("train_reward", "--reward_model_name_or_path", bert_folder, "--path", sheet_file, "--num_train_epochs", 1,
        "--report_to", "none", "--output_dir", tmp_path, "--run_name", "r")  # fmt: skip
    names = {f.name for f in (tmp_path / "r").iterdir()}
    assert names >= ADAPTER | REPORT and not names & {"folds", "judge"}
    test = split_by_conversation(dataset, 42, 0.2)["test"]
    pairs = pd.read_parquet(tmp_path / "r" / "pairs.parquet")
    assert pairs["row"].tolist() == test["row"]
    model = RewardModel.from_pretrained(str(tmp_path / "r"))
    margins = model.score(test["prompt"], test["chosen"]) - model.score(test["prompt"], test["rejected"])
    assert pairs["margin"].tolist() == pytest.approx(margins.tolist(), abs=1e-5)


REWARD = """
calls = []


def length(prompts, completions, completion_ids, topic, trainer_state, **kwargs):
    calls.append((prompts, completions, completion_ids, topic, trainer_state.global_step, sorted(kwargs)))
    return [len(completion[0]["content"]) / 10 for completion in completions]
"""


def test_a_reward_function_of_ones_own(gemma_folder, contexts_file, tmp_path, monkeypatch):
    """From a module in the current folder, called as TRL calls its own, with the file's further columns."""
    name = "rewards_of_this_test"
    (tmp_path / f"{name}.py").write_text(REWARD, encoding="utf-8")
    items = json.loads(contexts_file.read_text(encoding="utf-8"))
    topics = {str(item["context"]): f"topic {n}" for n, item in enumerate(items)}
    for item in items:
        item["topic"] = topics[str(item["context"])]
    (tmp_path / "contexts.json").write_text(json.dumps(items), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        run("train_policy", "--model_name_or_path", gemma_folder, "--hard_prompt", "Be kind.", "--path",
            "contexts.json", "--reward_function", f"{name}.length", "--max_steps", 2, "--per_device_train_batch_size",
            4, "--max_completion_length", 6, "--value_warmup_batches", 0, "--scale_rewards", "false",
            "--report_to", "none", "--output_dir", tmp_path / "out", "--run_name", "p")  # fmt: skip
        calls = sys.modules[name].calls
    finally:
        sys.modules.pop(name, None)
    # Training, evaluation and report alike: each row's topic is its own, its tokens are those of its reply.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "p")
    for prompts, replies, ids, topic, _, others in calls:
        assert topic == [topics[str(prompt)] for prompt in prompts]
        decoded = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids]
        assert decoded == [reply[0]["content"] for reply in replies] and len(set(decoded)) > 1
        assert others == ["log_extra", "log_metric"]
    steps = [step for *_, step, _ in calls]
    assert steps[0] == 0 and steps == sorted(steps) and set(steps) == {0, 1, 2}
    # The rollout's four first, then each evaluation's.
    folder = tmp_path / "out" / "p"
    completions = pd.read_parquet(folder / "completions" / "step-000001.parquet")
    prompts, replies, *_ = calls[0]
    assert replies == [[{"role": "assistant", "content": text}] for text in completions["completion"]]
    assert [p[0]["content"] for p in prompts] == [p[0]["content"] for p in completions["prompt"]]
    assert completions["score"].tolist() == pytest.approx([len(t) / 10 for t in completions["completion"]])
    assert {f.name for f in folder.iterdir()} >= ADAPTER | {"differences.png", "recipe.yaml"}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert any("eval_reward_difference" in line for line in state["log_history"])
