"""What comes from hardPrompt2softPrompt: its YAML is refused with a pointer, its `.pth` taken, its words kept."""

import json

import pandas as pd
import pytest
import torch
import yaml
from tiny import HARD_PROMPT, RECIPES, contexts, says, turns
from transformers import AutoTokenizer

from h2s import PrefixTuningPolicyModel
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.chat_template import ChatPrefix

REWARD_YAML = """
model:
  reward_model:
    bert_name: bert-base-chinese
    prefix_length: 20
    PPO_mode: false
    tokenizer_max_length: 492
dataset:
  data_path: human_eval.xlsx
  split_ratio: 0.8
task:
  root_path: /home/me/hardPrompt2softPrompt
  num_epoch: 100
  batch_size: 24
  learning_rate: 1e-3
  device: cuda
  output_path: outputs
"""
POLICY_YAML = """
task:
  batch_size: 6
  learning_rate: 1e-3
  use_kl: false
  root_path: /home/me/hardPrompt2softPrompt
dataset:
  data_path: contexts.json
model:
  reward_model: {reward_model_path: reward.pth, PPO_mode: true}
  policy_model:
    policy_model_name: google/gemma-3-1b-it
    prefix_prompt: You are a tester.
    max_length: 525
"""


@pytest.mark.parametrize("text", [REWARD_YAML, POLICY_YAML], ids=["reward", "policy"])
@pytest.mark.parametrize("name", RECIPES)
def test_its_yaml(name, text, refused):
    line = refused(name, text=text)
    says(line, "recipe.yaml has keys of hardPrompt2softPrompt (", "root_path", "data_path")
    says(line, 'README\'s table "Coming from hardPrompt2softPrompt" says where each is now')


@pytest.mark.parametrize("section", ["model", "dataset", "task"])
def test_a_key_of_its_yaml_in_a_recipe(section, refused):
    says(refused("train_policy", **{section: {"klL_coef": 0.5}}), "hardPrompt2softPrompt (klL_coef): README's table")


@pytest.fixture
def checkpoint(gemma_folder, tmp_path):
    """A `.pth` beside the recipe."""
    ids = AutoTokenizer.from_pretrained(gemma_folder)(HARD_PROMPT, add_special_tokens=False).input_ids
    torch.manual_seed(0)
    content = {"prefix_embeddings_state_dict": torch.randn(len(ids), 32), "prefix_ids": torch.tensor([ids])}
    torch.save(content, tmp_path / "old.pth")
    return "old.pth"


def test_its_checkpoint(recipes, write_recipe_of, checkpoint, tmp_path, gemma_folder):
    """Found beside the recipe; converted, measured, and told apart from its hard prompt."""
    model = {"hard_prompt": ..., "legacy_checkpoint": checkpoint}
    recipes["convert_prompt"].main(
        ["--config", str(write_recipe_of("convert_prompt", model=model)), "--run_name", "old"]
    )
    folder = tmp_path / "outputs" / "old"
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "prefix minus the prototype's own forward in float32: " in log
    assert "soft minus its hard prompt in float32: " in log and "its value head is not taken" in log
    prefix = ChatPrefix.load(folder)
    assert (prefix.hard_prompt, prefix.question_prefix, prefix.seen) == (HARD_PROMPT, "好的，題目如下：", ["unknown"])
    assert "to its hard prompt: float32" in (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["legacy_checkpoint"].endswith("old.pth")


def test_training_goes_on_from_it(recipes, write_recipe_of, checkpoint, tmp_path):
    """The trained prefix moves, the reference stays its hard prompt, and what it saw before stays unknown."""
    flags = ["--run_name", "old", "--question_prefix", "Q: "]
    model = {"hard_prompt": ..., "legacy_checkpoint": checkpoint}
    recipes["convert_prompt"].main(["--config", str(write_recipe_of("convert_prompt", model=model)), *flags])
    items = [{"context": [*turns("assistant"), {"role": "user", "content": f"{n}"}]} for n in range(40)]
    old = str(tmp_path / "outputs" / "old")
    config = write_recipe_of(
        "train_policy",
        model={"model_name_or_path": ..., "hard_prompt": ..., "prefix_adapter": old},
        dataset=contexts(tmp_path, items),
        task={"per_device_train_batch_size": 4, "report_to": "none"},
    )
    recipes["train_policy"].main(["--config", str(config), "--run_name", "new"])
    before, after = (PrefixTuningPolicyModel.from_pretrained(tmp_path / "outputs" / name) for name in ("old", "new"))
    assert 0 < (soft_prefix(after.model) - soft_prefix(before.model)).abs().max() < 0.1
    assert after.difference_to_hard_prompt() > 1e-2 and after.prefix.hard_prompt == HARD_PROMPT
    assert "unknown" in after.prefix.seen and len(after.prefix.seen) > 20
    assert before.prefix.question_prefix == after.prefix.question_prefix == "Q: "


@pytest.mark.parametrize("key", ["hard_prompt", "hard_prompt_file", "opening_user_message"])
def test_a_checkpoint_brings_its_own_prompt(key, refused, checkpoint):
    model = {"hard_prompt": ..., "legacy_checkpoint": checkpoint} | {key: "Be kind."}
    says(refused("convert_prompt", model=model), f"legacy_checkpoint brings its own {key}: leave {key} out")


def test_a_checkpoint_that_is_none(refused, tmp_path):
    (tmp_path / "old.pth").write_bytes(b"PK")
    for name, words in (("old.pth", "not whole"), ("no/such.pth", "there is no such file")):
        line = refused("convert_prompt", model={"hard_prompt": ..., "legacy_checkpoint": name})
        says(line, f"{name} cannot be read: ", words)


def test_a_checkpoint_needs_its_model(refused, checkpoint):
    model = {"hard_prompt": ..., "model_name_or_path": ..., "legacy_checkpoint": checkpoint}
    says(refused("convert_prompt", model=model), "model_name_or_path is missing")


# `question_prefix`


def assistant_first(tmp_path):
    return contexts(
        tmp_path,
        [{"context": [{"role": "assistant", "content": f"how was {n}?"}, *turns("user")]} for n in range(40)],
    )


def test_words_are_the_same_in_training_and_use(recipes, write_recipe_of, tmp_path):
    """Kept by the run; files, ids and the sheet to be judged have the contexts as they were."""
    model = {"opening_user_message": "start"}
    data = assistant_first(tmp_path)
    quiet = {"per_device_train_batch_size": 4, "report_to": "none"}
    for name, words in (("with", "Q: "), ("without", "")):
        config = write_recipe_of("train_policy", model=model, dataset={**data, "question_prefix": words}, task=quiet)
        recipes["train_policy"].main(["--config", str(config), "--run_name", name])
    with_words, without = (ChatPrefix.load(tmp_path / "outputs" / name) for name in ("with", "without"))
    assert (with_words.question_prefix, without.question_prefix) == ("Q: ", "")
    assert with_words.seen == without.seen != []
    adapter = str(tmp_path / "outputs" / "with")
    for flags in ([], ["--question_prefix", ""]):
        config = write_recipe_of("compare", model={"policy_adapter": adapter}, dataset=data)
        name = f"compared{len(flags)}"
        recipes["compare"].main(["--config", str(config), "--run_name", name, "--temperature", "2", *flags])
    own, none = (
        pd.read_parquet(tmp_path / "outputs" / name / "replies.parquet") for name in ("compared0", "compared2")
    )
    assert "Q: " not in own.to_csv() and own.to_csv().count("how was") == len(own)
    assert own["hard"].tolist() != none["hard"].tolist()


@pytest.mark.parametrize("name", ["convert_prompt", "train_policy", "compare"])
def test_words_for_conversations_that_begin_with_the_user(name, refused):
    says(refused(name, dataset={"question_prefix": "Q: "}), "question_prefix stands in front of the question that the")


@pytest.mark.parametrize("name", ["convert_prompt", "train_policy"])
def test_words_that_spell_out_a_special_token(name, refused):
    line = refused(name, model={"opening_user_message": "start"}, dataset={"question_prefix": "<bos>"})
    says(line, "question_prefix spells out '<bos>'")


def test_a_run_goes_on_with_the_words_that_it_began_with(recipes, write_recipe_of, tmp_path, capfd):
    model, data = {"opening_user_message": "start"}, {**assistant_first(tmp_path), "question_prefix": "Q: "}
    task = {"per_device_train_batch_size": 4, "report_to": "none", "run_name": "r"}
    config = str(write_recipe_of("train_policy", model=model, dataset=data, task=task))
    recipes["train_policy"].main(["--config", config])
    with pytest.raises(SystemExit):
        recipes["train_policy"].main(
            ["--config", config, "--resume_from_checkpoint", "true", "--question_prefix", "A: "]
        )
    says(capfd.readouterr().err.splitlines()[-1], "began with question_prefix Q: , this run has A: ")
    assert json.loads((tmp_path / "outputs" / "r" / "h2s.json").read_text())["question_prefix"] == "Q: "
