"""Each recipe's `main` on input that cannot be used: one line, exit code 2, nothing loaded, nothing written."""

import json

import pytest
from peft import PrefixTuningConfig, get_peft_model
from tiny import (
    CHAT_TEMPLATE,
    COLUMNS,
    GOOD_ROW,
    RECIPES,
    contexts,
    save_gemma,
    says,
    sheet,
    turns,
)

from h2s.models import load_base_model, load_tokenizer


@pytest.fixture(scope="module")
def other_prefix_adapter(gemma_folder, tmp_path_factory):
    """A causal prefix adapter that h2s did not make: no h2s.json."""
    folder = tmp_path_factory.mktemp("adapters") / "other"
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_base_model(str(gemma_folder)), config).save_pretrained(folder)
    return folder


WITH_DATA = ("train_reward", "train_policy", "compare")


@pytest.mark.parametrize("name", RECIPES)
def test_the_guard_itself(reaches_the_model, name):
    """The recipes these tests change are right: without a change a model does load."""
    reaches_the_model(name)


# The data


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("suffix", ["xlsx", "csv", "json", "jsonl", "parquet"])
def test_missing_file(refused, tmp_path, name, suffix):
    path = str(tmp_path / f"none.{suffix}")
    says(refused(name, dataset={"path": path}), "no such file", path)


@pytest.mark.parametrize("name", WITH_DATA)
def test_missing_data_path(refused, name):
    says(refused(name, dataset={"path": ...}), "path is missing", "section dataset", "--path")


@pytest.mark.parametrize("suffix", ["xlsx", "json", "jsonl", "parquet", "csv"])
def test_not_what_its_name_says(refused, tmp_path, suffix):
    file = tmp_path / f"sheet.{suffix}"
    file.write_bytes(b"\xff\xfe\x00 this is no table \x00\n" * 3)
    says(refused("train_reward", dataset={"path": str(file)}), f"sheet.{suffix} cannot be read as .{suffix}")


def test_text_file_renamed_to_a_workbook(refused, tmp_path):
    file = tmp_path / "sheet.xlsx"
    file.write_text("context_messages,policy_response\n", encoding="utf-8")
    says(refused("train_reward", dataset={"path": str(file)}), "sheet.xlsx cannot be read as .xlsx", *COLUMNS)


def test_file_of_another_kind(refused, tmp_path):
    (tmp_path / "sheet.docx").write_text("x", encoding="utf-8")
    says(refused("train_reward", dataset={"path": str(tmp_path / "sheet.docx")}), "sheet.docx is not a .xlsx, .csv")
    says(refused("train_reward", dataset={"path": str(tmp_path)}), "is not a .xlsx, .csv")


def test_missing_column(refused, tmp_path):
    data = sheet(tmp_path, [["hello", "a", "b"]], ["context_messages", "policy_response", "verdict"])
    line = refused("train_reward", dataset=data)
    says(line, "missing column reference_response, human_eval", "found context_messages, policy_response, verdict")
    line = refused("train_policy", dataset=contexts(tmp_path, [{"prompt": "hi", "id": 1}]))
    says(line, "no column 'context'", "found prompt, id")


def test_no_row_with_a_direction(refused, tmp_path):
    data = sheet(tmp_path, [[*GOOD_ROW[:3], 2], [*GOOD_ROW[:3], 3], [*GOOD_ROW[:3], 3]])
    says(refused("train_reward", dataset=data), "no row is labelled 0 or 1", "(3 rows)")


@pytest.mark.parametrize("label", [4, -1, 0.5, "better", None, True])
def test_label_outside_0_to_3(refused, tmp_path, label):
    data = sheet(tmp_path, [GOOD_ROW, GOOD_ROW, [*GOOD_ROW[:3], label]])
    says(refused("train_reward", dataset=data), "row 4", "human_eval must be 0, 1, 2 or 3")


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ('[{"role": "user", "content": "hi"', "neither JSON nor a Python literal"),
        ("[laughs] hello", "neither JSON nor a Python literal"),
        ('{"role": "user", "content": "hi"}', "expected a non-empty list of messages"),
        ("[]", "expected a non-empty list of messages"),
        ('["hi"]', "expected a message"),
        ('[{"role": "system", "content": "hi"}]', "must be 'user' or 'assistant', got 'system'"),
        ("__import__('os')", None),
        (json.dumps(turns("user", "user")), "must alternate between user and assistant, got two 'user'"),
        (json.dumps(turns("user", "assistant")), "the last message must be the user's"),
        (json.dumps([{"role": "user", "content": [{"type": "image", "url": "x"}]}]), "content parts must be"),
        ("", "non-empty text"),
        (r'[{"role": "user", "content": "half \ud83d a smile"}]', "half a character"),
    ],
)
def test_unreadable_context(refused, tmp_path, context, words):
    if words is None:  # plain text is a message, whatever it says
        from h2s.data.datasets import load_preferences

        data = sheet(tmp_path, [[context, *GOOD_ROW[1:]]])
        assert load_preferences(data["path"])[0]["prompt"] == [{"role": "user", "content": context}]
        return
    # Set aside or not, each row is checked.
    data = sheet(tmp_path, [GOOD_ROW, [context, "a", "b", 3]])
    says(refused("train_reward", dataset=data), "row 3: context_messages", words)
    data = contexts(tmp_path, [{"context": "hello"}, {"context": context}])
    says(refused("train_policy", dataset=data), "row 2, context:", words)


@pytest.mark.parametrize("empty", ["", "  ", None])
@pytest.mark.parametrize("column", [1, 2])
def test_empty_response(refused, tmp_path, column, empty):
    row = list(GOOD_ROW)
    row[column] = empty
    line = refused("train_reward", dataset=sheet(tmp_path, [GOOD_ROW, row]))
    says(line, f"row 3: {COLUMNS[column]}", "got an empty cell")


def test_no_contexts(refused, tmp_path):
    says(refused("train_policy", dataset=contexts(tmp_path, [])), "no column 'context'", "found none")
    says(refused("train_policy", dataset=contexts(tmp_path, {"context": "hi"})), "it is not a list of objects")


def test_context_that_begins_with_the_wrong_role(refused, tmp_path):
    data = contexts(tmp_path, [{"context": "hello"}, {"context": turns("assistant", "user")}])
    for name in ("train_policy", "compare"):
        says(refused(name, dataset=data), "context 2 begins with the assistant", "opening_user_message")


def test_context_longer_than_the_model_takes(refused, tmp_path):
    data = contexts(tmp_path, [{"context": "hello"}, {"context": "tea " * 1200}])
    for name in ("train_policy", "compare"):
        says(refused(name, dataset=data), "context 2 is", "tokens long", "max_completion_length")


def test_too_few_conversations_for_the_split(refused, tmp_path):
    data = contexts(tmp_path, [{"context": "hello"}] * 5)
    says(refused("train_policy", dataset=data), "part is empty", "1 conversations are too few", "test_size 0.2")


@pytest.mark.parametrize("share", [0, 0.6, -0.1, float("nan")])
def test_test_size_out_of_range(refused, share):
    says(refused("train_reward", dataset={"test_size": share}), "test_size must lie between 0 and 0.6")


@pytest.mark.parametrize("folds", [1, 0, -3, 21])
def test_folds_that_do_not_fit(refused, folds):
    line = refused("train_reward", dataset={"folds": folds})
    says(line, "folds must be at least 2 and at most half of the 40 conversations", f"got {folds}")


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan")])
def test_judge_share_out_of_range(refused, share):
    says(refused("train_reward", dataset={"judge_share": share}), "judge_share must lie between 0 and 1, got")


def test_too_few_conversations_for_a_judge(refused):
    line = refused("train_reward", dataset={"judge_share": 0.001})
    says(line, "too few to share between a reward model and a judge", "judge_share 0.001")


# The recipe


@pytest.mark.parametrize("name", RECIPES)
def test_unknown_key(refused, name):
    section = {"convert_prompt": "model", "generate": "task"}.get(name, "dataset")
    wrong, right = {
        "model": ("hard_promt", "hard_prompt"),
        "dataset": ("split_sed", "split_seed"),
        "task": ("temprature", "temperature"),
    }[section]
    line = refused(name, **{section: {wrong: 1}})
    says(line, "recipe.yaml", f"section {section}", f"unknown key {wrong}", f"did you mean {right}?")


@pytest.mark.parametrize(
    ("name", "section", "key", "value", "right"),
    [
        ("train_policy", "task", "path", "x.json", "dataset"),
        ("train_policy", "model", "learning_rate", 1e-3, "task"),
        ("train_reward", "dataset", "num_virtual_tokens", 4, "model"),
        ("convert_prompt", "task", "hard_prompt", "Be kind.", "model"),
        ("compare", "model", "top_k", 5, "task"),
    ],
)
def test_misplaced_key(refused, name, section, key, value, right):
    line = refused(name, **{section: {key: value}})
    says(line, "recipe.yaml", f"section {section}", f"{key} belongs in section {right}")


@pytest.mark.parametrize(
    ("name", "section", "key", "value", "words"),
    [
        ("train_policy", "task", "num_ppo_epochs", [2], "must be int, got list [2]"),
        ("train_policy", "task", "num_ppo_epochs", 3.7, "must be int, got float 3.7"),
        ("train_policy", "task", "learning_rate", "fast", "invalid float value: 'fast'"),
        ("train_reward", "model", "num_virtual_tokens", True, "must be int, got bool True"),
        ("convert_prompt", "model", "hard_prompt", 7, "must be str, got int 7; put it in quotes"),
        ("generate", "dataset", "conversation", False, "must be str, got bool False; put it in quotes"),
        ("convert_prompt", "model", "dtype", "float16", "invalid choice: 'float16'"),
        ("compare", "dataset", "split", "train", "invalid choice: 'train' (choose from "),
    ],
)
def test_mistyped_key(refused, name, section, key, value, words):
    says(refused(name, **{section: {key: value}}), "recipe.yaml", f"section {section}: ", key, words)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [1]", "section model: expected keys and values, got list"),
        ("modle: {}", "unknown section 'modle'"),
        ("learning_rate: 1", "unknown section 'learning_rate'"),
        ("- 1", "got list"),
        ("", "got NoneType"),
        ("model: {a: [}", "is not YAML"),
    ],
)
def test_not_a_recipe(refused, name, text, words):
    says(refused(name, text=text), "recipe.yaml", words)


@pytest.mark.parametrize("name", RECIPES)
def test_flags_that_are_none(refused, name):
    says(refused(name, ["--temprature", "1"]), "unknown flag --temprature")
    says(refused(name, ["--output", "x"]), "unknown flag --output")
    says(refused(name, ["--seed", "many"]), "--seed", "'many'")


def test_recipe_that_is_not_there(recipes, capfd, tmp_path):
    with pytest.raises(SystemExit) as stop:
        recipes["train_policy"].main(["--config", str(tmp_path / "none.yaml")])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    says(line, "error: no such recipe", "none.yaml")


# The prompt


@pytest.mark.parametrize("name", ["convert_prompt", "train_policy"])
def test_hard_prompt_and_its_file(refused, tmp_path, name):
    file = tmp_path / "prompt.txt"
    file.write_text("Be kind.", encoding="utf-8")
    says(refused(name, model={"hard_prompt_file": str(file)}), "one of hard_prompt and hard_prompt_file, got both")
    says(refused(name, model={"hard_prompt": ...}), "one of hard_prompt and hard_prompt_file, got none")
    missing = {"hard_prompt": ..., "hard_prompt_file": str(tmp_path / "none.txt")}
    says(refused(name, model=missing), "hard_prompt_file cannot be read", "none.txt")


@pytest.mark.parametrize("name", ["convert_prompt", "train_policy"])
def test_empty_prompt(refused, tmp_path, name):
    says(refused(name, model={"hard_prompt": ""}), "the hard prompt is empty")
    says(refused(name, model={"hard_prompt": " \n "}), "the hard prompt is empty")
    (tmp_path / "prompt.txt").write_text("\n", encoding="utf-8")
    line = refused(name, model={"hard_prompt": ..., "hard_prompt_file": "prompt.txt"})
    says(line, "the hard prompt is empty")
    says(refused(name, model={"opening_user_message": ""}), "opening_user_message is empty")


def test_prompt_longer_than_the_model(refused, tmp_path):
    model = save_gemma(tmp_path / "short", positions=24)
    line = refused("convert_prompt", model={"model_name_or_path": str(model)})
    says(line, "the hard prompt is 31 tokens long", "no room")


# Models and adapters

MODEL_KEYS = [
    ("convert_prompt", "model_name_or_path"),
    ("train_policy", "model_name_or_path"),
    ("train_reward", "reward_model_name_or_path"),
]


@pytest.mark.parametrize(("name", "key"), MODEL_KEYS)
def test_model_folder_that_is_none(refused, tmp_path, name, key):
    (tmp_path / "folder").mkdir()
    says(refused(name, model={key: str(tmp_path / "folder")}), "folder is not a model folder", "config.json")
    says(refused(name, model={key: str(tmp_path / "gone")}), "gone is not a model folder")
    says(refused(name, model={key: ...}), f"{key} is missing", "section model", f"--{key}")
    says(refused(name, model={key: "embedded:gpt"}), "not an embedded model", "embedded:minilm")
    (tmp_path / "folder" / "config.json").write_text("{", encoding="utf-8")
    says(refused(name, model={key: str(tmp_path / "folder")}), "folder")


def test_model_without_chat_template(refused, gemma_folder, tmp_path):
    tokenizer = load_tokenizer(str(gemma_folder))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "base" / file).write_bytes((gemma_folder / file).read_bytes())
    for name in ("convert_prompt", "train_policy"):
        line = refused(name, model={"model_name_or_path": str(tmp_path / "base")})
        says(line, "no chat template", "instruct model")


def test_reward_model_that_is_no_bert(refused, gemma_folder):
    line = refused("train_reward", model={"reward_model_name_or_path": str(gemma_folder)})
    says(line, "is a gemma3_text model", "must be a BERT")


@pytest.mark.parametrize("number", [2, 125, -1])
def test_max_tokens_that_do_not_fit(refused, number):
    line = refused("train_reward", model={"max_tokens": number})
    says(line, "max_tokens must lie between 5 and 124", "128 positions minus 4 virtual tokens", f"got {number}")


@pytest.mark.parametrize("name", ["train_policy", "compare"])
def test_reward_adapter_that_is_none(refused, tmp_path, policy_adapter, name):
    (tmp_path / "plain").mkdir()
    line = refused(name, model={"reward_adapter": str(tmp_path / "plain")})
    says(line, "plain is not a reward adapter", "no adapter_config.json")
    line = refused(name, model={"reward_adapter": str(policy_adapter)})
    says(line, "is not a reward adapter", "CAUSAL_LM")
    says(refused(name, model={"reward_adapter": str(tmp_path / "gone")}), "no such adapter folder", "gone")


@pytest.mark.parametrize("name", ["train_policy", "compare"])
def test_judge_that_is_the_reward(refused, reward_adapter, name):
    """Also by another path to the same folder."""
    same = {"reward_adapter": str(reward_adapter), "judge_adapter": f"{reward_adapter.parent}/./{reward_adapter.name}/"}
    says(refused(name, model=same), "judge_adapter and reward_adapter are the same", "--judge_share")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("reward_diference", ["must be one of soft_reward, hard_reward, reward_difference, ", "got reward_diference"]),
        ("judge_difference", ["got judge_difference; those of the judge need a judge_adapter"]),
    ],
)
def test_metric_that_no_evaluation_measures(refused, metric, words):
    says(refused("train_policy", task={"metric_for_best_model": metric}), "metric_for_best_model", *words)


def test_neither_or_both_of_reward_adapter_and_reward_function(refused):
    line = refused("train_policy", model={"reward_adapter": ...})
    says(line, "one of reward_adapter and reward_function", "section model", "got none")
    line = refused("train_policy", model={"reward_function": "math.fsum"})
    says(line, "one of reward_adapter and reward_function", "section model", "got both")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("asks_back", "must be a dotted path such as my_rewards.asks_back, got 'asks_back'"),
        ("no_such_module.asks_back", "no_such_module.asks_back cannot be imported"),
        ("math.asks_back", "math.asks_back cannot be imported"),
        ("math.pi", "math.pi is a float, not a function"),
    ],
)
def test_reward_function_that_is_none(refused, path, words):
    says(refused("train_policy", model={"reward_adapter": ..., "reward_function": path}), "reward_function", words)


@pytest.mark.parametrize("name", ["generate", "compare"])
def test_policy_adapter_that_is_none(refused, tmp_path, reward_adapter, other_prefix_adapter, name):
    (tmp_path / "plain").mkdir()
    line = refused(name, model={"policy_adapter": str(tmp_path / "plain")})
    says(line, "plain is not a policy adapter", "no adapter_config.json")
    line = refused(name, model={"policy_adapter": str(reward_adapter)})
    says(line, "is not a policy adapter", "SEQ_CLS")
    line = refused(name, model={"policy_adapter": str(other_prefix_adapter)})
    says(line, "is not a policy adapter made by h2s", "h2s.json")
    says(refused(name, model={"policy_adapter": ...}), "policy_adapter is missing")


def test_prefix_adapter_beside_a_prompt(refused, policy_adapter, gemma_folder):
    line = refused("train_policy", model={"prefix_adapter": str(policy_adapter), "model_name_or_path": ...})
    says(line, "prefix_adapter brings its own hard_prompt")


def test_prefix_adapter_that_is_none(refused, reward_adapter):
    model = {"prefix_adapter": str(reward_adapter), "model_name_or_path": ..., "hard_prompt": ...}
    says(refused("train_policy", model=model), "is not a policy adapter", "SEQ_CLS")


def test_conversation_that_cannot_be_answered(refused):
    says(refused("generate", dataset={"conversation": "[1"}), "neither JSON nor a Python literal")
    says(refused("generate", dataset={"conversation": str(turns("user", "assistant"))}), "the last message must be")


# Settings


@pytest.mark.parametrize("name", ["train_reward", "train_policy"])
@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing(refused, name, key):
    says(refused(name, task={key: True}), "gradient_checkpointing", "prefix", "leave it off")
    says(refused(name, [f"--{key}", "true"]), "gradient_checkpointing", "prefix", "leave it off")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fp16": True}, "fp16 is not supported"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
        ({"ratio_norm": "sum"}, "ratio_norm"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"cliprange": 1.5}, "cliprange must be between 0 and 1, got 1.5"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"num_mini_batches": 4, "per_device_train_batch_size": 3}, "num_mini_batches is 4, more than the 3"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
    ],
)
def test_policy_settings(refused, settings, words):
    says(refused("train_policy", task=settings), words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature >= 0"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length and batch_size must be at least 1"),
    ],
)
@pytest.mark.parametrize("name", ["generate", "compare"])
def test_sampling_settings(refused, name, settings, words):
    says(refused(name, task=settings), words)


@pytest.mark.parametrize("name", ["convert_prompt", "train_reward", "train_policy", "compare"])
def test_run_folder_that_exists(refused, tmp_path, name):
    folder = tmp_path / "outputs" / "first"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    line = refused(name, task={"run_name": "first"}, files=2)
    says(line, "first exists", "choose another run_name")
    assert (folder / "adapter_config.json").read_text(encoding="utf-8") == "{}"


def test_too_few_contexts_for_an_iteration(refused):
    line = refused("train_policy", task={"per_device_train_batch_size": 1000})
    says(line, "fewer than the 1000 of one iteration", "lower per_device_train_batch_size")
