"""What the tests share: tiny models as folders, adapters, data, and the recipes on them."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing from a second thread, and processes that share two cores lose much by it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pandas as pd
import pytest
import torch
import transformers
import yaml
from tiny import (
    COLUMNS,
    HARD_PROMPT,
    RECIPES,
    ROOT,
    WORDS,
    ModelLoads,
    build_reward_model,
    sample_context,
    save_bert,
    save_gemma,
)
from transformers import BertForSequenceClassification

from h2s import PrefixTuningPolicyModel
from h2s.models import load_base_model, load_tokenizer


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    return save_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def loud_bert(bert_folder, tmp_path_factory) -> str:
    """The tiny BERT with ten times its weights: as it is, it makes nearly the same of every text."""
    folder = tmp_path_factory.mktemp("models") / "loud-bert"
    model = BertForSequenceClassification.from_pretrained(bert_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    load_tokenizer(str(bert_folder)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(gemma_folder):
    return load_base_model(str(gemma_folder), dtype="float32")


@pytest.fixture
def tokenizer(gemma_folder):
    return load_tokenizer(str(gemma_folder))


@pytest.fixture
def policy(gemma_folder) -> PrefixTuningPolicyModel:
    """A fresh tiny policy with its frozen hard prompt beside it."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="float32")
    policy.add_hard_prompt()
    return policy


@pytest.fixture
def prompts(policy):
    return policy.encode([sample_context(i) for i in range(6)], 1)


@pytest.fixture(scope="session")
def contexts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "contexts.json"
    pd.Series([{"context": sample_context(i)} for i in range(40)]).to_json(file, orient="records", force_ascii=False)
    return file


@pytest.fixture(scope="session")
def sheet_file(tmp_path_factory) -> Path:
    """Judgements by a rule: the reply that asks is better. Two rows a conversation; some without direction."""
    rows = []
    for i in range(40):
        asks, tells = f"how was the {WORDS[i % 12]}?", f"i like the {WORDS[(i + 5) % 12]}."
        rows.append([str(sample_context(i)), asks, tells, 0])
        rows.append([str(sample_context(i)), tells, asks, 1])
    rows.append([str(sample_context(3)), "nice.", "good.", 2])
    rows.append([str(sample_context(4)), "and you?", "what is it?", 3])
    file = tmp_path_factory.mktemp("data") / "judgements.xlsx"
    pd.DataFrame(rows, columns=COLUMNS).to_excel(file, index=False)
    return file


@pytest.fixture(scope="session")
def recipes():
    """The five recipes as modules."""
    modules = {}
    for name in RECIPES:
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture(scope="session")
def policy_adapter(gemma_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "policy"
    PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_adapter(bert_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "reward"
    build_reward_model(bert_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """From here on a model that loads raises `ModelLoads`."""

    def from_pretrained(*args, **kwargs):
        raise ModelLoads

    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)


@pytest.fixture
def write_recipe_of(tmp_path, gemma_folder, bert_folder, contexts_file, sheet_file, reward_adapter, policy_adapter):
    """Write the YAML of a recipe that is right, but for what is changed by section; `...` takes a key out."""

    def write(name, text=None, **sections):
        task = {"output_dir": str(tmp_path / "outputs")}
        generation = {**task, "max_completion_length": 8}
        policy_model = {"model_name_or_path": str(gemma_folder), "hard_prompt": HARD_PROMPT}
        data = {"path": str(contexts_file)}
        content = {
            "convert_prompt": {"model": policy_model, "task": task},
            "train_reward": {
                "model": {"reward_model_name_or_path": str(bert_folder), "num_virtual_tokens": 4},
                "dataset": {"path": str(sheet_file)},
                "task": {**task, "max_steps": 1},
            },
            "train_policy": {
                "model": {**policy_model, "reward_adapter": str(reward_adapter)},
                "dataset": data,
                "task": {**generation, "max_steps": 1},
            },
            "generate": {
                "model": {"policy_adapter": str(policy_adapter)},
                "dataset": {"conversation": "hello"},
                "task": generation,
            },
            "compare": {"model": {"policy_adapter": str(policy_adapter)}, "dataset": data, "task": generation},
        }[name]
        for section, keys in sections.items():
            changed = {**content.get(section, {}), **keys}
            content[section] = {k: v for k, v in changed.items() if v is not Ellipsis}
        config = tmp_path / "recipe.yaml"
        if isinstance(text, bytes):
            config.write_bytes(text)
        else:
            config.write_text(yaml.safe_dump(content) if text is None else text, encoding="utf-8")
        return config

    return write


@pytest.fixture
def refused(recipes, write_recipe_of, no_model, tmp_path, capfd):
    """Run a recipe and return the line of its refusal: exit code 2, no model loaded, no more than `files` there."""

    def run(name, flags=(), files=0, text=None, **sections):
        config = write_recipe_of(name, text, **sections)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            recipes[name].main(["--config", str(config), *flags])
        captured = capfd.readouterr()
        assert stop.value.code == 2
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert captured.out == ""
        assert len(list((tmp_path / "outputs").rglob("*"))) == files
        return lines[0]

    return run


@pytest.fixture
def reaches_the_model(recipes, write_recipe_of, no_model, tmp_path):
    """Run a recipe up to where its first model would load: all that it was given is found good."""

    def run(name, flags=(), text=None, **sections):
        config = write_recipe_of(name, text, **sections)
        with pytest.raises(ModelLoads):
            recipes[name].main(["--config", str(config), *flags])
        return tmp_path / "outputs"

    return run
