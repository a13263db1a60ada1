import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from h2s.errors import InputError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.reward.config import TaskArguments
from h2s.run.arguments import (
    CompareDatasetArguments,
    CompareModelArguments,
    ConvertArguments,
    DatasetArguments,
    GenerateArguments,
    HardPromptArguments,
    PolicyModelArguments,
    PushArguments,
    QuestionArguments,
    RewardDatasetArguments,
    RewardModelArguments,
    RunArguments,
)
from h2s.run.recipe import parse_command, parse_recipe, resume_mismatch, write_recipe

POLICY = (PolicyModelArguments, DatasetArguments, SingleStepPPOConfig)
REWARD = (RewardModelArguments, RewardDatasetArguments, TaskArguments)
COMPARE = (CompareModelArguments, CompareDatasetArguments, GenerateArguments)
CONVERT = (HardPromptArguments, QuestionArguments, ConvertArguments)


@pytest.fixture
def parse(tmp_path):
    """Parse a recipe's text and flags."""

    def run(classes, text, *flags):
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return parse_recipe(*classes, ["--config", str(file), *flags])

    return run


RECIPE = """
model:
  hard_prompt: Be kind, 你好.
  reward_adapter: owner/reward
dataset:
  path: contexts.json
  split_seed: 7
task:
  learning_rate: 1e-4
  num_ppo_epochs: 3
  target_kl: null
  whiten_advantages: false
  report_to: [tensorboard]
  logging_steps: 5
"""


def test_sections_and_defaults(parse):
    model, dataset, task = parse(POLICY, RECIPE)
    assert (type(model), type(dataset), type(task)) == POLICY
    assert (model.hard_prompt, model.reward_adapter, model.dtype) == ("Be kind, 你好.", "owner/reward", "auto")
    assert (dataset.path, dataset.split_seed, dataset.test_size) == ("contexts.json", 7, 0.2)
    assert (task.learning_rate, task.num_ppo_epochs, task.target_kl) == (1e-4, 3, None)
    assert (task.whiten_advantages, task.report_to, task.logging_steps) == (False, ["tensorboard"], 5)
    assert (task.kl_coef, task.output_dir, task.weight_decay) == (0.05, "outputs", 0.0)


def test_flags_override(parse):
    flags = ["--learning_rate", "3e-4", "--split_seed=8", "--whiten_advantages", "true", "--hard_prompt", "x"]
    model, dataset, task = parse(POLICY, RECIPE, *flags, "--target_kl=0.5")
    assert (model.hard_prompt, dataset.split_seed, dataset.path) == ("x", 8, "contexts.json")
    assert (task.learning_rate, task.whiten_advantages, task.target_kl) == (3e-4, True, 0.5)
    assert task.num_ppo_epochs == 3


def test_flags_alone():
    model, dataset, task = parse_recipe(*POLICY, ["--path", "x.json", "--max_steps", "3"])
    assert (model.hard_prompt, dataset.path, task.max_steps) == (None, "x.json", 3)


def test_config_with_an_equals_sign(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset: {split_seed: 9}", encoding="utf-8")
    assert parse_recipe(*POLICY, [f"--config={tmp_path / 'recipe.yaml'}"])[1].split_seed == 9


@pytest.mark.parametrize("text", ["dataset: {split_seed: 9}", "model:\ndataset: {split_seed: 9}\ntask: {}"])
def test_empty_sections_may_be_left_out(parse, text):
    assert parse(POLICY, text)[1].split_seed == 9


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", "'1e-3'", ".001", "1.0e-3"])
def test_forms_of_a_float(parse, number):
    rate = parse(POLICY, f"task: {{learning_rate: {number}}}")[2].learning_rate
    assert type(rate) is float and rate == 0.001


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("temperature", "1", 1),
        ("target_kl", "null", None),
        ("target_kl", "none", None),  # as TRL's flags have it
        ("save_total_limit", "", None),
        ("whiten_advantages", "no", False),
        ("remove_unused_columns", "null", None),
        ("eval_strategy", "'no'", "no"),
        ("optim", "adamw_torch", "adamw_torch"),
        ("report_to", "tensorboard", ["tensorboard"]),
        ("report_to", "[]", []),
        ("lr_scheduler_kwargs", "{num_cycles: 2}\n  lr_scheduler_type: cosine", {"num_cycles": 2}),
        ("lr_scheduler_kwargs", """'{"num_cycles": 2}'\n  lr_scheduler_type: cosine""", {"num_cycles": 2}),
        *[("run_name", f"'{text}'", text) for text in ("", "--", "--seed", "-x", "a b", "a=b", "null", "true", "007")],
    ],
)
def test_values(parse, key, text, value):
    assert getattr(parse(POLICY, f"task:\n  {key}: {text}\n")[2], key) == value


def test_numbers_in_a_list(parse):
    weights = parse(POLICY, "task: {reward_weights: [1, 0.5, 1e-3, -2e-3]}")[2].reward_weights
    assert weights == [1, 0.5, 0.001, -0.002]
    for wrong, words in (
        ("[1, true]", "must be float, got bool True"),
        ("[[1]]", r"must be float, got list \[1\]"),
        ("[1, many]", "invalid float value: 'many'"),
        ("1", "must be list, got int 1"),
    ):
        with pytest.raises(InputError, match=rf"recipe\.yaml, section task: .*reward_weights.*{words}$"):
            parse(POLICY, f"task: {{reward_weights: {wrong}}}")


def test_defaults_of_a_recipe(tmp_path):
    file, defaults = tmp_path / "recipe.yaml", {"eval_strategy": "no", "target_kl": None}

    def read(text, *flags):
        file.write_text(text, encoding="utf-8")
        task = parse_recipe(*POLICY, ["--config", str(file), *flags], **defaults)[2]
        return task.eval_strategy, task.target_kl, task.num_ppo_epochs

    assert read("task: {}") == ("no", None, 1)
    assert read("task: {eval_strategy: steps}", "--target_kl", "0.3") == ("steps", 0.3, 1)
    # What was chosen against the recipe's default is written, though it is the dataclass's.
    first = parse_recipe(*POLICY, ["--target_kl", "0.1"], **defaults)
    write_recipe(file, *first, **defaults)
    assert read(file.read_text(encoding="utf-8")) == ("no", 0.1, 1)


@pytest.mark.parametrize(
    ("classes", "section", "line", "words"),
    [
        (POLICY, "task", "num_ppo_epochs: [2]", r"num_ppo_epochs must be int, got list \[2\]"),
        (POLICY, "task", "num_ppo_epochs: 3.7", r"num_ppo_epochs must be int, got float 3\.7"),
        (POLICY, "task", "num_ppo_epochs: 1e3", "num_ppo_epochs must be int, got str '1e3'"),
        (POLICY, "task", "num_ppo_epochs: '2'", "num_ppo_epochs must be int, got str '2'"),
        (POLICY, "task", "num_ppo_epochs: true", "num_ppo_epochs must be int, got bool True"),
        (POLICY, "task", "num_ppo_epochs: null", "num_ppo_epochs must be int, got NoneType None"),
        (POLICY, "task", "num_ppo_epochs:", "num_ppo_epochs must be int, got NoneType None"),
        (POLICY, "task", "save_total_limit: 2.5", r"save_total_limit must be int, got float 2\.5"),
        (POLICY, "task", "learning_rate: fast", "argument --learning_rate.*: invalid float value: 'fast'"),
        (POLICY, "task", "target_kl: ''", "argument --target_kl.*: invalid float value: ''"),
        (POLICY, "task", "save_total_limit: '2'", "save_total_limit must be int, got str '2'"),
        (POLICY, "task", "warmup_steps: --", "warmup_steps must be float, got str '--'"),
        (POLICY, "task", "learning_rate: {a: 1}", "learning_rate must be float, got dict"),
        (POLICY, "task", "learning_rate: yes", "learning_rate must be float, got bool True"),
        (POLICY, "task", "whiten_advantages: 1", "whiten_advantages must be bool, got int 1"),
        (POLICY, "task", "whiten_advantages: 'no'", "whiten_advantages must be bool, got str 'no'"),
        (POLICY, "task", "run_name: 2024", "run_name must be str, got int 2024; put it in quotes"),
        (POLICY, "model", "hard_prompt: no", "hard_prompt must be str, got bool False; put it in quotes"),
        (POLICY, "model", "hard_prompt: 7", "hard_prompt must be str, got int 7; put it in quotes"),
        (POLICY, "model", "hard_prompt: [Be kind]", "hard_prompt must be str, got list"),
        (POLICY, "model", "dtype: float16", "argument --dtype: invalid choice: 'float16'"),
        (POLICY, "model", "dtype: 16", "dtype must be 'auto' or 'bfloat16' or 'float32', got int 16"),
        (POLICY, "model", "hard_prompt: !!binary YWI=", "hard_prompt must be str, got bytes b'ab'"),
        (POLICY, "dataset", "path: {a: b}", "path must be list or str, got dict"),
        (COMPARE, "dataset", "split: train", "argument --split: invalid choice: 'train'"),
        (COMPARE, "dataset", "split: null", "split must be 'test' or 'all', got NoneType None"),
        (REWARD, "model", "max_tokens: 96.5", r"max_tokens must be int, got float 96\.5"),
        (POLICY, "task", "run_name: 007", "run_name must be str, got int 7; put it in quotes"),
        (POLICY, "task", "run_name: 2024-01-01", "run_name must be str, got date .*; put it in quotes"),
        (CONVERT, "task", "output_dir: null", "output_dir must be str, got NoneType None; put it in quotes"),
        (POLICY, "task", "optim: quick", "argument --optim: invalid choice: 'quick'"),
        (POLICY, "task", "logging_strategy: no", "logging_strategy must be .*; put it in quotes"),
        (POLICY, "task", "lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs must be dict or str, got list"),
        (POLICY, "task", "label_names: labels", "label_names must be list, got str 'labels'"),
        (POLICY, "task", "label_names: [a, 7]", "label_names must be str, got int 7; put it in quotes"),
        (POLICY, "task", "report_to: [null]", "report_to must be str, got NoneType None"),
        (POLICY, "task", "debug: [all]", "argument --debug: invalid DebugOption value: 'all'"),
        (
            POLICY,
            "model",
            "device_map: auto",
            "unknown key device_map: it spreads one process's model over several cards",
        ),
        (POLICY, "task", "learning_rte: 1", r"unknown key learning_rte; did you mean learning_rate\?$"),
        (POLICY, "task", "num_minibatches: 1", r"unknown key num_minibatches; did you mean num_mini_batches\?$"),
        (POLICY, "model", "hard_prompt_fil: 1", r"unknown key hard_prompt_fil; did you mean hard_prompt_file\?$"),
        (POLICY, "dataset", "split_sead: 1", r"unknown key split_sead; did you mean split_seed\?$"),
        (POLICY, "dataset", "cliprang: 1", r"unknown key cliprang; did you mean cliprange\?$"),  # of another section
        (POLICY, "task", "zzzzzz: 1", "unknown key zzzzzz$"),
        (POLICY, "model", "learning_rate: 1e-3", "learning_rate belongs in section task$"),
        (POLICY, "task", "path: x.json", "path belongs in section dataset$"),
        (POLICY, "dataset", "dtype: auto", "dtype belongs in section model$"),
    ],
)
def test_refused_line(parse, classes, section, line, words):
    with pytest.raises(InputError, match=rf"recipe\.yaml, section {section}: {words}") as error:
        parse(classes, f"{section}:\n  {line}\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell: {}", "unknown section 'modell'; expected model, dataset, task; did you mean model"),
        ("env: {H2S_TEST: x}", "unknown section 'env'"),
        ("1: {}", "unknown section 1"),
        ("learning_rate: 1e-3", "unknown section 'learning_rate'"),
        ("model: text", "section model: expected keys and values, got str"),
        ("", "expected the sections model, dataset, task, got NoneType"),
        ("[model]", "got list"),
        ("model: {a: [}", "is not YAML"),
        ("model:\n\thard_prompt: x", "is not YAML"),
    ],
)
def test_not_a_recipe(parse, text, words):
    with pytest.raises(InputError, match=words) as error:
        parse(POLICY, text)
    assert "\n" not in str(error.value)
    assert "H2S_TEST" not in os.environ


def test_recipe_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=f"no such recipe: {path}"):
            parse_recipe(*POLICY, ["--config", str(path)])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        parse_recipe(*POLICY, ["--config", str(tmp_path / "binary.yaml")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning", "1e-3"], "unknown flag --learning; did you mean --learning_rate"),
        (["--learning_rat", "1e-3"], "unknown flag --learning_rat; did you mean --learning_rate"),
        (["--hard", "x"], "unknown flag --hard"),
        (["word"], "unknown flag word"),
        (["--num_ppo_epochs", "2.5"], "^argument --num_ppo_epochs.*: invalid int value: '2.5'$"),  # no file
        (["--learning_rate", "fast"], "learning_rate.*'fast'"),
        (["--learning_rate"], "learning_rate.*expected one argument"),
        (["--dtype", "float16"], "dtype.*'float16'"),
        (["--config"], "config.*expected one argument"),
        (["--whiten_advantages", "a\nb"], "whiten_advantages.*got a b"),
    ],
)
def test_flags_that_are_wrong(parse, flags, words):
    with pytest.raises(InputError, match=words) as error:
        parse(POLICY, RECIPE, *flags)
    assert "\n" not in str(error.value)


# Paths


def test_list_of_paths(tmp_path, monkeypatch):
    """One, several or none, in the YAML, where each is looked for beside it, and as flags."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipes" / "compare.yaml"
    file.parent.mkdir()
    (file.parent / "anna.xlsx").touch()
    anna = str(file.parent / "anna.xlsx")
    for text, expected in (
        ("[anna.xlsx, ben.xlsx]", [anna, "ben.xlsx"]),
        ("anna.xlsx", [anna]),
        ("null", None),
        ("[]", []),
    ):
        file.write_text(f"dataset:\n  judged: {text}\n", encoding="utf-8")
        assert parse_recipe(*COMPARE, ["--config", str(file)])[1].judged == expected
        flags = ["--config", str(file), "--judged", "cai.xlsx", "dan.xlsx"]
        assert parse_recipe(*COMPARE, flags)[1].judged == ["cai.xlsx", "dan.xlsx"]
    file.write_text("dataset:\n  judged: [a, --loss]\n", encoding="utf-8")
    assert parse_recipe(*COMPARE, ["--config", str(file)])[1].judged == ["a", "--loss"]
    file.write_text("dataset:\n  judged: [1]\n", encoding="utf-8")
    with pytest.raises(InputError, match="judged must be str, got int 1"):
        parse_recipe(*COMPARE, ["--config", str(file)])


def test_paths_are_looked_for_beside_the_recipe_first(tmp_path, monkeypatch):
    recipe_folder, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipe_folder, here):
        folder.mkdir()
        (folder / "both.json").touch()
    (recipe_folder / "prompt.txt").write_text("Be kind.\n", encoding="utf-8")
    (recipe_folder / "reward").mkdir()
    (here / "gemma").mkdir()
    (recipe_folder / "recipe.yaml").write_text(
        "model: {hard_prompt_file: prompt.txt, reward_adapter: ../recipes/reward, model_name_or_path: gemma}\n"
        "dataset: {path: both.json}\ntask: {output_dir: reward}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(here)
    model, dataset, task = parse_recipe(*POLICY, ["--config", "../recipes/recipe.yaml"])
    assert (here / dataset.path).samefile(recipe_folder / "both.json")
    assert (here / model.reward_adapter).samefile(recipe_folder / "reward")
    assert (here / model.hard_prompt_file).samefile(recipe_folder / "prompt.txt")
    # Not beside the recipe: as it stands, from the current folder. What is written never goes beside the recipe.
    assert model.model_name_or_path == "gemma"
    assert task.output_dir == "reward"
    # A flag is about the current folder.
    assert parse_recipe(*POLICY, ["--config", "../recipes/recipe.yaml", "--path", "both.json"])[1].path == "both.json"


def test_a_rewards_module_is_looked_for_beside_the_recipe_too(tmp_path, monkeypatch):
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for file in (beside / "mine.py", beside / "pack" / "__init__.py", beside / "pack" / "own.py", here / "mine.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(here)

    def read(path, *flags):
        (beside / "recipe.yaml").write_text(f"model: {{reward_function: {path}}}", encoding="utf-8")
        return parse_recipe(*POLICY, ["--config", str(beside / "recipe.yaml"), *flags])[0].reward_function

    for path in ("mine.asks", "pack.asks", "pack.own.asks", "../recipes/mine.asks"):
        assert read(path) == str(beside / path)
    for path in ("yours.asks", "trl.rewards.asks", "recipe.asks"):
        assert read(path) == path
    assert read("mine.asks", "--reward_function", "mine.asks") == "mine.asks"


def test_home_is_home_in_every_section(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(
        "model: {hard_prompt_file: ~/a, reward_adapter: ~/b, reward_function: ~/c.d}\n"
        "dataset: {path: [~/e, f]}\ntask: {output_dir: ~/g, run_name: ~}\n",
        encoding="utf-8",
    )
    flags = ["--config", "~/recipe.yaml", "--judge_adapter", "~/h", "--hard_prompt", "~/ is my home"]
    model, dataset, task = parse_recipe(*POLICY, flags)
    given = [model.hard_prompt_file, model.reward_adapter, model.reward_function, *dataset.path, task.output_dir]
    assert given == [*(f"{tmp_path}/{name}" for name in ("a", "b", "c.d", "e")), "f", f"{tmp_path}/g"]
    assert (model.judge_adapter, model.hard_prompt) == (f"{tmp_path}/h", "~/ is my home")
    others = parse_recipe(*CONVERT, ["--output_dir", "~/g"])[2], parse_recipe(*COMPARE, ["--output_dir", "~/g"])[2]
    assert {section.output_dir for section in others} == {f"{tmp_path}/g"}


def test_absolute_paths_and_hub_names_stay(parse, tmp_path):
    text = f"model: {{model_name_or_path: owner/name, reward_adapter: {tmp_path}}}\ndataset: {{path: owner/data}}"
    model, dataset, _ = parse(POLICY, text)
    assert (model.model_name_or_path, model.reward_adapter, dataset.path) == ("owner/name", str(tmp_path), "owner/data")


# What was run


def settings(values):
    return {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}


@pytest.mark.parametrize(
    ("classes", "flags"),
    [
        (POLICY, ["--hard_prompt", 'Be kind: 你好 🙂\n- "a" #b', "--learning_rate", "3e-4", "--target_kl", "0.25"]),
        (
            POLICY,
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--warmup_steps", "3"],
        ),
        (POLICY, ["--ratio_norm", "mean", "--eval_strategy", "no", "--report_to", "none", "--run_name", "2024"]),
        (POLICY, ["--chat_template_kwargs", '{"enable_thinking": false}', "--reward_weights", "0.5"]),
        (
            POLICY,
            ["--target_kl", "null", "--adam_epsilon", "1e-07", "--learning_rate", "1e-05", "--optim", "adamw_torch"],
        ),
        *[
            (POLICY, ["--hard_prompt", text, "--run_name", text])
            for text in ("007", "true", "null", "1e-3", "~", "2:30")
        ],
        (REWARD, ["--path", "sheet.xlsx", "--max_tokens", "96", "--num_train_epochs", "0.5", "--seed", "7"]),
        (COMPARE, ["--split", "all", "--temperature", "0", "--top_p", "0.9"]),
        (CONVERT, ["--hard_prompt", "no", "--opening_user_message", "yes", "--push_to_hub", "true"]),
    ],
)
def test_what_was_run_can_be_run_again(classes, flags, tmp_path):
    defaults = {"eval_strategy": "steps"} if classes is POLICY else {}
    first = parse_recipe(*classes, flags, **defaults)
    file = tmp_path / "recipe.yaml"
    write_recipe(file, *first, **defaults)
    second = parse_recipe(*classes, ["--config", str(file)], **defaults)
    assert [settings(s) for s in first] == [settings(s) for s in second]
    # Every flag is told, though some value may be its default.
    text = file.read_text(encoding="utf-8")
    assert all(flag.removeprefix("--") in text for flag in flags[::2])


@pytest.mark.parametrize("classes", [POLICY, REWARD, CONVERT])
def test_no_secret_is_written(classes, tmp_path):
    write_recipe(
        tmp_path / "recipe.yaml", *parse_recipe(*classes, ["--hub_token", "hf_secret", "--hub_model_id", "a/b"])
    )
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "hf_secret" not in text and "token" not in text
    assert yaml.safe_load(text)["task"]["hub_model_id"] == "a/b"


def test_defaults_are_not_written(tmp_path):
    write_recipe(tmp_path / "recipe.yaml", *parse_recipe(*COMPARE, ["--temperature", "0.7", "--top_k", "5"]))
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert content == {"model": {}, "dataset": {}, "task": {"top_k": 5}}


@pytest.mark.parametrize(
    ("section", "key", "began", "now"),
    [
        ("dataset", "split_seed", 7, 42),
        ("dataset", "test_size", 0.2, 0.3),
        ("dataset", "test_size", 0.3, 0.2),
        ("dataset", "folds", 5, 4),
        ("dataset", "judge_share", None, 0.5),
        ("model", "num_virtual_tokens", 20, 8),
        ("model", "max_tokens", 64, None),
    ],
)
def test_another_model_or_split_than_the_runs(tmp_path, section, key, began, now):
    """Files may have been moved."""

    def sections(path, value):
        model, dataset = ({key: value} if section == name else {} for name in ("model", "dataset"))
        return RewardModelArguments(f"{path}/bert", **model), RewardDatasetArguments(f"{path}/sheet.xlsx", **dataset)

    file = tmp_path / "run" / "recipe.yaml"
    assert resume_mismatch(file, *sections("here", began)) is None  # killed before it wrote its recipe
    file.parent.mkdir()
    write_recipe(file, *sections("here", began), RunArguments())
    assert resume_mismatch(file, *sections("there", began)) is None
    words = f"{file.parent} began with {key} {began}, this run has {now}: go on with the former, or choose another"
    assert words in resume_mismatch(file, *sections("here", now))


def test_a_kill_leaves_a_whole_recipe(tmp_path, monkeypatch):
    """It is written aside and renamed."""
    file = tmp_path / "recipe.yaml"
    write_recipe(file, *parse_recipe(*COMPARE, ["--top_k", "5"]))
    monkeypatch.setattr(Path, "replace", lambda *args: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_recipe(file, *parse_recipe(*COMPARE, ["--top_k", "6"]))
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["task"] == {"top_k": 5}


# A command that is no recipe


def test_a_command_is_flags_and_what_stands_without_one():
    settings, folder = parse_command(PushArguments, ["--hub_private_repo", "true", "out put"], folder="A folder.")
    assert (settings, folder) == (PushArguments(hub_private_repo=True), "out put")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "the following arguments are required: folder"),
        (["a", "--hub_model", "b"], "unknown flag --hub_model; did you mean --hub_model_id?"),
        (["a", "--hub_private_repo", "many"], "many"),
        (["a", "b"], "unknown flag b"),
    ],
)
def test_a_command_that_is_none(flags, said):
    with pytest.raises(InputError) as refusal:
        parse_command(PushArguments, flags, folder="A folder.")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
