"""What the tests share: tiny models as folders, adapters, data, and the recipes on them."""

import importlib.util
import os
import shutil
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
from hub_server import Repository, running_hub
from huggingface_hub import constants
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


@pytest.fixture(autouse=True)
def seeded():
    """No test's draws depend on which ran before it."""
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def published(gemma_folder, loud_bert, tmp_path_factory) -> dict[str, Path]:
    """The tiny models under their names on the Hub, as folders of the Hub's cache."""
    cache = tmp_path_factory.mktemp("cache")
    folders = {}
    for name, source in (("makers/tiny-gemma", gemma_folder), ("makers/tiny-bert", loud_bert)):
        snapshot = (
            cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        )
        folders[name] = Path(shutil.copytree(source, snapshot))
    return folders


@pytest.fixture
def hub(published, monkeypatch, tmp_path_factory):
    """A Hub over HTTP that holds the tiny models; this process is logged in there as `me`."""
    with running_hub() as hub:
        for name, folder in published.items():
            repository = hub.repositories[name] = Repository()
            repository.commits[folder.name] = {f.name: f.read_bytes() for f in folder.iterdir()}
            repository.refs["main"] = folder.name
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("downloads")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # else it asks the Hub that it was made for
        monkeypatch.setenv("HF_TOKEN", "hf_of_me")
        yield hub


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
    """The recipes as modules."""
    modules = {}
    for name in (*RECIPES, "push"):
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
            "train_dpo": {
                "model": policy_model,
                "dataset": {"path": str(sheet_file)},
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
