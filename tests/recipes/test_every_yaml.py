"""Every YAML under recipes/ is parsed into its recipe's dataclasses and run, tiny models in place of the named ones."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file
from tiny import HARD_PROMPT, ROOT

from h2s import PrefixTuningPolicyModel, RewardModel
from h2s.data.datasets import load_preferences
from h2s.errors import InputError

RECIPES = {
    "convert": "convert_prompt",
    "reward": "train_reward",
    "policy": "train_policy",
    "dpo": "train_dpo",
    "compare": "compare",
}
YAMLS = sorted((ROOT / "recipes").glob("*/*.yaml"))
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "h2s.json", "README.md", "recipe.yaml"}
SMALL = {
    "convert": [],
    "reward": ["--num_train_epochs", "1", "--max_tokens", "90", "--test_size", "0.3"],
    "policy": ["--max_steps", "2", "--num_train_epochs", "1", "--max_completion_length", "6"],
    "dpo": ["--max_steps", "2", "--max_completion_length", "6"],
    "compare": ["--max_completion_length", "6"],
}


def run(recipe: str, *argv: object) -> None:
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def reward_adapter(bert_folder, sheet_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward")
    quiet = ["--report_to", "none", "--num_train_epochs", 2]
    run("train_reward", "--reward_model_name_or_path", bert_folder, "--path", sheet_file, "--output_dir", out,
        "--run_name", "r", *quiet)  # fmt: skip
    return out / "r"


@pytest.fixture(scope="module")
def assistant_first(tmp_path_factory, contexts_file):
    """Contexts that begin with the assistant, for recipes with an opening user message."""
    items = json.loads(contexts_file.read_text())
    for i, item in enumerate(items):
        item["context"] = [{"role": "assistant", "content": f"question {i}?"}, item["context"][0]]
    file = tmp_path_factory.mktemp("data") / "assistant_first.json"
    file.write_text(json.dumps(items))
    return file


@pytest.fixture(scope="module")
def policy_adapter(gemma_folder, tmp_path_factory):
    """A converted prompt for conversations that begin with the assistant."""
    out = tmp_path_factory.mktemp("policy")
    run("convert_prompt", "--model_name_or_path", gemma_folder, "--hard_prompt", "You are a kind helper.",
        "--opening_user_message", "start", "--output_dir", out, "--run_name", "p")  # fmt: skip
    return out / "p"


@pytest.mark.parametrize("file", YAMLS, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_yaml_runs(file, gemma_folder, bert_folder, sheet_file, contexts_file, assistant_first, reward_adapter,
                   policy_adapter, tmp_path):  # fmt: skip
    recipe = RECIPES[file.stem]
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    flags = ["--config", file, "--output_dir", tmp_path, "--run_name", "run", *SMALL[file.stem]]
    if file.stem in ("convert", "policy", "dpo"):
        flags += ["--model_name_or_path", gemma_folder, "--dtype", "float32"]
        assert content["model"].get("dtype") == ("bfloat16" if "gemma-3-1b-it" in str(file) else None)
    if file.stem in ("reward", "policy", "dpo"):
        flags += ["--report_to", "none"]
    if file.stem == "dpo":
        flags += ["--path", sheet_file]
    if file.stem == "reward":
        flags += ["--reward_model_name_or_path", bert_folder, "--path", sheet_file]
    if file.stem == "policy":
        assert len(json.loads(contexts_file.read_text())) == 40  # 28 or so train: a whole iteration of 24 fits
        opening = "opening_user_message" in content["model"]
        flags += ["--path", assistant_first if opening else contexts_file, "--reward_adapter", reward_adapter]
    if file.stem == "compare":
        flags += ["--policy_adapter", policy_adapter, "--reward_adapter", reward_adapter, "--path", assistant_first]
    if "judge_adapter" in content["model"]:
        judge = shutil.copytree(reward_adapter, tmp_path / "judge")
        if file.stem == "dpo":  # the tiny reward learnt from the whole sheet
            identity = json.loads((judge / "h2s.json").read_text(encoding="utf-8"))
            (judge / "h2s.json").write_text(json.dumps(identity | {"seen": []}), encoding="utf-8")
        flags += ["--judge_adapter", judge]
    run(recipe, *flags)
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "train.log"} <= names
    if file.stem == "compare":
        assert len([n for n in names if n.endswith(".xlsx")]) == 1 and len([n for n in names if "key" in n]) == 1
    else:
        assert names >= ADAPTER
    if file.stem in ("reward", "dpo"):
        assert names >= {"accuracy.md", "accuracy.png", "pairs.parquet"}
    if file.stem == "dpo":
        assert names >= {"trainer_state.json", "what_changed.md", "differences.png"}
        assert "by the judge" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    if file.stem == "reward":
        assert ("judge" in names) == ("judge_share" in content["dataset"])
        assert ("folds" in names) == ("folds" in content["dataset"])
    if file.stem == "policy":
        assert names >= {"value_head.safetensors", "trainer_state.json", "completions"}
        assert list((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    assert not list((tmp_path / "run").rglob("training_args.bin"))


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda f: f.name)
def test_accelerate_reads_its_configs(file):
    assert load_config_from_file(str(file)).num_processes >= 1


def test_compare_then_people_then_reward(policy_adapter, assistant_first, bert_folder, tmp_path, capsys):
    """The next round's judgements come from the blinded sheet."""
    import openpyxl

    trained = shutil.copytree(policy_adapter, tmp_path / "trained")
    weights = load_file(trained / "adapter_model.safetensors")
    torch.manual_seed(0)
    # An untrained one answers as the hard prompt does, and two identical replies are left out of the sheet.
    save_file({k: w + 10 * torch.randn(w.shape) for k, w in weights.items()}, trained / "adapter_model.safetensors")
    run("compare", "--policy_adapter", trained, "--path", assistant_first,
        "--max_completion_length", 16, "--temperature", 1, "--language", "zh-TW",
        "--output_dir", tmp_path, "--run_name", "c")  # fmt: skip
    first = (tmp_path / "c" / "README.md").read_text(encoding="utf-8").splitlines()[2]
    assert first == "Not scored: neither a reward nor a judge was given."
    (sheet,) = (tmp_path / "c").glob("*.xlsx")
    with pytest.raises(InputError, match="0 rows, 8 without a verdict"):
        load_preferences(str(sheet))
    book = openpyxl.load_workbook(sheet)
    for name, verdicts in (("anna", ("A 較好", "B 較好")), ("ben", ("兩個都不好", None)), ("judged", (0, 1))):
        for row in range(2, book.worksheets[0].max_row + 1):
            book.worksheets[0].cell(row, 4).value = verdicts[row % 2]
        book.save(tmp_path / "c" / f"{name}.xlsx")
    capsys.readouterr()
    run("compare", "--judged", tmp_path / "c" / "anna.xlsx", tmp_path / "c" / "ben.xlsx")
    first, *_, anna, ben, agreement = capsys.readouterr().out.splitlines()
    assert first.startswith("Not shown what people prefer: of the judgements with a direction soft is better in 0.")
    assert anna.endswith("anna.xlsx: 8 of 8 rows judged") and ben.endswith("ben.xlsx: 4 of 8 rows judged")
    assert agreement.startswith("- 4 pairs were judged by two people or more, and all say the same of 0 (0.000); ")
    again = ["--reward_model_name_or_path", bert_folder, "--path", tmp_path / "c" / "judged.xlsx",
             "--report_to", "none", "--num_train_epochs", 1, "--output_dir", tmp_path, "--run_name", "r2"]  # fmt: skip
    with pytest.raises(SystemExit):
        run("train_reward", *again)
    assert "8 conversations found, all held out by test_size 0.2 and split_seed 42" in capsys.readouterr().err
    run("train_reward", *again, "--split_seed", 1, "--test_size", 0.4)
    assert (tmp_path / "r2" / "adapter_model.safetensors").is_file()


def test_policy_goes_on_from_an_adapter(policy_adapter, assistant_first, reward_adapter, tmp_path):
    """The reference stays the hard prompt of the adapter's h2s.json, and is not saved."""
    run("train_policy", "--prefix_adapter", policy_adapter, "--reward_adapter", reward_adapter, "--path",
        assistant_first, "--max_steps", 1, "--per_device_train_batch_size", 4, "--max_completion_length", 5,
        "--report_to", "none", "--output_dir", tmp_path, "--run_name", "p")  # fmt: skip
    before, after = (json.loads((f / "h2s.json").read_text()) for f in (policy_adapter, tmp_path / "p"))
    seen = before.pop("seen"), after.pop("seen")
    assert before == after and after["hard_prompt"] == "You are a kind helper."
    assert seen[0] == [] and len(seen[1]) > 30  # what trained it and its reward
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()


def test_several_rewards_are_their_mean(gemma_folder, bert_folder, sheet_file, contexts_file, reward_adapter, tmp_path):
    run("train_reward", "--reward_model_name_or_path", bert_folder, "--path", sheet_file, "--report_to", "none",
        "--num_train_epochs", 1, "--seed", 1, "--max_tokens", 20,
        "--output_dir", tmp_path, "--run_name", "second")  # fmt: skip
    rewards = ["--reward_adapter", reward_adapter, tmp_path / "second"]
    run("train_policy", "--model_name_or_path", gemma_folder, "--hard_prompt", HARD_PROMPT, "--path", contexts_file,
        *rewards, "--max_steps", 1, "--missing_eos_penalty", 0, "--scale_rewards", "false",
        "--max_completion_length", 4, "--report_to", "none",
        "--output_dir", tmp_path, "--run_name", "policy")  # fmt: skip
    assert "the reward cut " in (tmp_path / "policy" / "train.log").read_text(encoding="utf-8")
    replies = pd.read_parquet(next((tmp_path / "policy" / "completions").iterdir()))
    columns = ["rewards/" + name for name in (reward_adapter.name, "second")]
    assert replies[columns].nunique().min() > 1
    assert replies["score"].tolist() == pytest.approx(replies[columns].mean(axis=1).tolist(), rel=1e-5)
    run("compare", "--policy_adapter", tmp_path / "policy", "--path", contexts_file, *rewards,
        "--max_completion_length", 4, "--output_dir", tmp_path, "--run_name", "compared")  # fmt: skip
    replies = pd.read_parquet(tmp_path / "compared" / "replies.parquet")
    alone = [RewardModel.from_pretrained(folder).score(list(replies["prompt"]), list(replies["soft"]))
             for folder in rewards[1:]]  # fmt: skip
    assert replies["soft_reward"].tolist() == pytest.approx(torch.stack(alone).mean(0).tolist(), rel=1e-4)


def test_a_judge_selects_and_reports(gemma_folder, bert_folder, sheet_file, contexts_file, reward_adapter, tmp_path):
    """With a judge the best step is the one that it prefers, whatever the reward says; both are reported."""
    quiet = ["--report_to", "none", "--output_dir", tmp_path]
    # On the same conversations as the reward: on others it may have seen all that is reported.
    run("train_reward", "--reward_model_name_or_path", bert_folder, "--path", sheet_file, "--seed", 7,
        "--num_train_epochs", 1, "--run_name", "judge", *quiet)  # fmt: skip
    run("train_policy", "--model_name_or_path", gemma_folder, "--hard_prompt", "Be kind.", "--path", contexts_file,
        "--reward_adapter", reward_adapter, "--judge_adapter", tmp_path / "judge", "--max_steps", 3, "--eval_steps", 1,
        "--learning_rate", 0.3, "--per_device_train_batch_size", 4, "--max_completion_length", 6, "--run_name", "p",
        *quiet)  # fmt: skip
    state = json.loads((tmp_path / "p" / "trainer_state.json").read_text())
    lines = [r for r in state["log_history"] if "eval_judge_difference" in r]
    assert len(lines) == 3 and all("eval_reward_difference" in r for r in lines)
    assert state["best_metric"] == max(r["eval_judge_difference"] for r in lines)
    card, log, changed = (
        (tmp_path / "p" / name).read_text(encoding="utf-8") for name in ("README.md", "train.log", "what_changed.md")
    )
    assert "| judge |" in card and "| judge, both replies finished |" in card
    # What came out comes first, in the card and of all that the log reports; then which step it is of.
    verdict, *lines = card.split("# A system prompt as a soft prefix\n\n")[1].splitlines()
    kept = lines[1 if verdict.startswith("Not shown") else 0]  # after how many would be needed
    assert re.fullmatch(
        r"(Gained|Lost|Not shown), by the judge: soft minus hard \S+ \[\S+, \S+\] \(95% interval\), "
        r"(\d+) contexts \(\2 conversations\)\.", verdict)  # fmt: skip
    beat = state["best_metric"] > 0
    assert kept.startswith(f"Step {state['best_global_step']} of 3 is kept" if beat else "No step beat the hard prompt")
    assert f"tep {state['best_global_step']} of 3" in kept and ("best" in kept) == beat
    assert f"  {verdict}\n" in log  # after the time
    assert "best adapter" not in card + log
    assert changed.startswith("# What changed\n\nThe replies that changed most by the judge, ")


def test_generate_replies_and_chats(policy_adapter, capsys, monkeypatch):
    conversation = [{"role": "assistant", "content": "how was it?"}, {"role": "user", "content": "good walk"}]
    flags = ["--policy_adapter", policy_adapter, "--max_completion_length", 5, "--temperature", 0]
    run("generate", *flags, "--conversation", json.dumps(conversation))
    reply = capsys.readouterr().out
    lines = iter(["how was it?", "good walk", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run("generate", *flags)
    assert f"assistant: {reply.strip()}" in capsys.readouterr().out  # greedy: the chat's first reply is the same


def test_the_prototypes_call(policy_adapter, gemma_folder, tmp_path):
    policy = PrefixTuningPolicyModel.from_pretrained(str(policy_adapter))
    history = [{"role": "user", "content": [{"type": "text", "text": "good walk"}]}]
    answered = policy.generate_response(asked_question="how?", conversation_history=history, temperature=0.7)
    assert answered[:-1] == history and answered[-1]["role"] == "assistant"
    assert answered[-1]["content"][0].keys() == {"type", "text"}

    run("convert_prompt", "--model_name_or_path", gemma_folder, "--hard_prompt", "Be kind.", "--output_dir", tmp_path,
        "--run_name", "p")  # fmt: skip
    without = PrefixTuningPolicyModel.from_pretrained(str(tmp_path / "p"))
    with pytest.raises(InputError, match="opening_user_message"):
        without.generate_response(asked_question="how?", conversation_history=history)
