"""Each recipe's `main` on input that cannot be used: one line, exit code 2, nothing loaded, nothing written.

The plain mistakes, in one table; hostile and odd files stand in `test_hostile_input.py`.
"""

import json

import pytest
import yaml
from tiny import COLUMNS, GOOD_ROW, HARD_PROMPT, RECIPES, contexts, sample_context, save_gemma, says, sheet, turns

from h2s.data.messages import conversation_id
from h2s.models import load_tokenizer

WITH_DATA = ("train_reward", "train_policy", "train_dpo", "compare")
WITH_PROMPT = ("convert_prompt", "train_policy", "train_dpo")
WITH_SHEET = ("train_reward", "train_dpo")
WITH_CONTEXTS = ("train_policy", "compare")
WITH_ADAPTER = ("generate", "compare")
TRAINERS = ("train_reward", "train_policy", "train_dpo")


def rows(*given, columns=COLUMNS):
    """A sheet of judgements."""
    return lambda p: {"dataset": sheet(p.folder, list(given), columns)}


def items(*given, **columns):
    """A file of contexts, with further columns."""
    return lambda p: {
        "dataset": contexts(
            p.folder, [{"context": c} | {k: v[n] for k, v in columns.items()} for n, c in enumerate(given)]
        )
    }


def data(name, content):
    return lambda p: p.file(name, content)


def model(**keys):
    return {"model": keys}


def dataset(**keys):
    return {"dataset": keys}


def task(**keys):
    return {"task": keys}


def flags(*given):
    return {"flags": given}


# Models and adapters


def without_template(p):
    folder = p.copy("gemma")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(str(folder)).chat_template is None
    return model(model_name_or_path=str(folder))


def short_model(p):
    return model(model_name_or_path=str(save_gemma(p.folder / "short", positions=24)))


def made_by_others(p):
    folder = p.copy("policy")
    (folder / "h2s.json").unlink()
    return model(policy_adapter=str(folder))


def empty(key):
    """An empty folder."""
    return lambda p: model(**{key: p.empty("plain")})


def ours(key, of):
    """One of the models and adapters that are right in another place."""
    return lambda p: model(**{key: str(getattr(p, of))})


def going_on_from(adapter, **keys):
    """A prefix adapter in place of model and hard prompt."""
    instead = {"model_name_or_path": ..., "hard_prompt": ...} | keys
    return lambda p: model(prefix_adapter=str(getattr(p, adapter)), **instead)


def same_judge(p):
    """By another path to the same folder."""
    return model(reward_adapter=str(p.reward), judge_adapter=f"{p.reward.parent}/./{p.reward.name}/")


def saw_all(key):
    """An adapter that every context has trained or selected."""
    seen = [conversation_id(sample_context(i)) for i in range(40)]
    return lambda p: model(**{key: str(p.copy("policy" if key == "policy_adapter" else "reward", h2s={"seen": seen}))})


def prompt_file(file, content="\n"):
    return lambda p: p.file("prompt.txt", content) and model(hard_prompt=..., hard_prompt_file=file)


SUFFIXES = ("xlsx", "csv", "json", "jsonl", "parquet")
BYTES = b"\xff\xfe\x00 this is no table \x00\n" * 3
UNLABELLED = GOOD_ROW[:3]
# Judgements of as many conversations as a split needs.
FIRST, SPREAD = [str(sample_context(0))], [[str(sample_context(i)), "a", "b", i % 2] for i in range(1, 20)]
MODEL_KEYS = {
    "convert_prompt": "model_name_or_path",
    "train_policy": "model_name_or_path",
    "train_dpo": "model_name_or_path",
    "train_reward": "reward_model_name_or_path",
}
MISPELT = {"convert_prompt": ("model", "hard_promt", "hard_prompt"), "generate": ("task", "temprature", "temperature")}
UNREADABLE = [
    ('[{"role": "user", "content": "hi"', "neither JSON nor a Python literal"),
    ("[laughs] hello", "neither JSON nor a Python literal"),
    ('{"role": "user", "content": "hi"}', "expected a non-empty list of messages"),
    ("[]", "expected a non-empty list of messages"),
    ('["hi"]', "expected a message"),
    ('[{"role": "system", "content": "hi"}]', "must be 'user' or 'assistant', got 'system'"),
    (json.dumps(turns("user", "user")), "must alternate between user and assistant, got two 'user'"),
    (json.dumps(turns("user", "assistant")), "the last message must be the user's"),
    (json.dumps([{"role": "user", "content": [{"type": "image", "url": "x"}]}]), "content parts must be"),
    (r'[{"role": "user", "content": "half \ud83d a smile"}]', "half a character"),
]

# In which recipes, what is changed of a recipe that is right, and words of the line.
TABLE = [
    # The data
    *[(WITH_DATA, dataset(path=f"/nowhere/none.{s}"), "no such file", f"/nowhere/none.{s}") for s in SUFFIXES],
    (WITH_DATA, dataset(path=...), "path is missing", "section dataset", "--path"),
    *[(WITH_SHEET, data(f"a.{s}", BYTES), f"a.{s} cannot be read as .{s}", *COLUMNS) for s in SUFFIXES],
    (WITH_DATA, data("sheet.docx", "x"), "sheet.docx is not a .xlsx, .csv"),
    (WITH_DATA, dataset(path="."), "is not a .xlsx, .csv"),
    (WITH_SHEET, rows(["hello", "a", "b"], columns=[*COLUMNS[:2], "verdict"]),
     "missing column reference_response, human_eval", "found context_messages, policy_response, verdict"),
    (WITH_SHEET, rows(*[[*UNLABELLED, n] for n in (2, 3, 3)]), "no row is labelled 0 or 1", "(3 rows)"),
    *[(WITH_SHEET, rows(GOOD_ROW, GOOD_ROW, [*UNLABELLED, label]), "row 4, human_eval: expected 0, 1, 2 or 3")
      for label in (4, -1, 0.5, "better", True)],
    # Set aside or not, each row is checked.
    *[(WITH_SHEET, rows(GOOD_ROW, [c, "a", "b", 3]), "row 3, context_messages:", words) for c, words in UNREADABLE],
    *[(WITH_CONTEXTS, items("hello", c), "row 2, context:", words) for c, words in UNREADABLE],
    *[(WITH_SHEET, rows(GOOD_ROW, [empty if n == column else cell for n, cell in enumerate(GOOD_ROW)]),
       f"row 3, {COLUMNS[column]}: ", "got an empty cell") for column in (0, 1, 2) for empty in ("", "  ", None)],
    (WITH_CONTEXTS, data("a.json", '[{"prompt": "hi", "id": 1}]'), "missing column context", "found prompt, id"),
    (WITH_CONTEXTS, data("a.json", "[]"), "missing column context", "found none"),
    (WITH_CONTEXTS, data("a.json", '{"context": "hi"}'), "it is not a list of objects"),
    (WITH_CONTEXTS, items("hi", "ho", topic=[1, "tea"]), "contexts.json, column topic: a column holds values of one"),
    ("train_policy", items(*map(str, range(40)), completions=range(40)), "has a column completions", "rename it"),
    (WITH_CONTEXTS, items(*[turns("assistant", "user")] * 2), "context 1 begins with the assistant", "opening_user"),
    (WITH_CONTEXTS, items("hello", turns("assistant", "user")), "1 of 2 contexts begin with the", "mend context 2"),
    (WITH_CONTEXTS, items("hello", "tea " * 1200), "context 2 is", "tokens long", "max_completion_length"),
    (WITH_CONTEXTS, items(*["hello"] * 5), "part is empty: 1 conversations are too few for test_size 0.2"),
    *[(WITH_DATA, dataset(test_size=share), "test_size must lie between 0 and 0.6", f"got {share}")
      for share in (0, 0.6, -0.1, float("nan"))],
    *[("train_reward", dataset(folds=folds), "40 conversations found: folds must be at least 2", f"got {folds}")
      for folds in (1, 0, -3, 21)],
    *[("train_reward", dataset(judge_share=share), "judge_share must lie between 0 and 1, got")
      for share in (0, 1, -0.5, 1.5, float("nan"))],
    ("train_reward", dataset(judge_share=0.001), "too few to share between a reward model and a judge", "share 0.001"),
    ("generate", dataset(conversation="[1"), "neither JSON nor a Python literal"),
    ("generate", dataset(conversation=str(turns("user", "assistant"))), "the last message must be"),
    # The recipe
    *[(name, {section: {wrong: 1}}, f"recipe.yaml, section {section}: unknown key {wrong}; did you mean {right}?")
      for name in RECIPES for section, wrong, right in [MISPELT.get(name, ("dataset", "split_sed", "split_seed"))]],
    *[(name, {section: {key: value}}, f"recipe.yaml, section {section}: {key} belongs in section {right}")
      for name, section, key, value, right in [
          ("train_policy", "task", "path", "x.json", "dataset"),
          ("train_policy", "model", "learning_rate", 1e-3, "task"),
          ("train_reward", "dataset", "num_virtual_tokens", 4, "model"),
          ("convert_prompt", "task", "hard_prompt", "Be kind.", "model"),
          ("compare", "model", "top_k", 5, "task"),
      ]],
    *[(name, {section: {key: value}}, f"recipe.yaml, section {section}: ", key, words)
      for name, section, key, value, words in [
          ("train_policy", "task", "num_ppo_epochs", [2], "must be int, got list [2]"),
          ("train_policy", "task", "num_ppo_epochs", 3.7, "must be int, got float 3.7"),
          ("train_policy", "task", "learning_rate", "fast", "invalid float value: 'fast'"),
          ("train_reward", "model", "num_virtual_tokens", True, "must be int, got bool True"),
          ("convert_prompt", "model", "hard_prompt", 7, "must be str, got int 7; put it in quotes"),
          ("generate", "dataset", "conversation", False, "must be str, got bool False; put it in quotes"),
          ("convert_prompt", "model", "dtype", "float16", "invalid choice: 'float16'"),
          ("compare", "dataset", "split", "train", "invalid choice: 'train' (choose from "),
      ]],
    (RECIPES, {"text": "model: [1]"}, "recipe.yaml, section model: expected keys and values, got list"),
    (RECIPES, {"text": "modle: {}"}, "recipe.yaml: unknown section 'modle'"),
    (RECIPES, {"text": "learning_rate: 1"}, "recipe.yaml: unknown section 'learning_rate'"),
    (RECIPES, {"text": "- 1"}, "recipe.yaml: expected the sections model, dataset, task, got list"),
    (RECIPES, {"text": ""}, "recipe.yaml: expected the sections model, dataset, task, got NoneType"),
    (RECIPES, {"text": "model: {a: [}"}, "recipe.yaml is not YAML"),
    (RECIPES, flags("--temprature", "1"), "unknown flag --temprature"),
    (RECIPES, flags("--output", "x"), "unknown flag --output"),
    (RECIPES, flags("--seed", "many"), "--seed", "'many'"),
    (RECIPES, flags("--config", "none.yaml"), "no such recipe: none.yaml"),
    # The prompt
    (WITH_PROMPT, model(hard_prompt_file="prompt.txt"), "one of hard_prompt and hard_prompt_file, got both"),
    (WITH_PROMPT, model(hard_prompt=...), "one of hard_prompt and hard_prompt_file, got none"),
    (WITH_PROMPT, prompt_file("none.txt"), "hard_prompt_file cannot be read", "none.txt"),
    (WITH_PROMPT, prompt_file("Be kind. " * 600), "hard_prompt_file cannot be read"),
    (WITH_PROMPT, model(hard_prompt=...) | flags("--hard_prompt_file", "a\0b"), "hard_prompt_file cannot be read"),
    (WITH_PROMPT, model(hard_prompt=""), "the hard prompt is empty"),
    (WITH_PROMPT, model(hard_prompt=" \n "), "the hard prompt is empty"),
    (WITH_PROMPT, prompt_file("prompt.txt"), "the hard prompt is empty"),
    (WITH_PROMPT, model(opening_user_message=""), "opening_user_message is empty"),
    (WITH_PROMPT, short_model, "the hard prompt is 31 tokens long", "no room"),
    # Models
    *[(name, change, *words) for name, key in MODEL_KEYS.items() for change, *words in [
          (empty(key), "plain is not a model folder", "config.json"),
          (lambda p, key=key: p.file("config.json", "{") and model(**{key: str(p.folder)}), "expected weights in safe"),
          (model(**{key: "/nowhere/gone"}), "gone is not a model folder"),
          (model(**{key: ...}), f"{key} is missing: set it in section model", f"--{key}"),
          (model(**{key: "embedded:gpt"}), "not an embedded model", "embedded:minilm"),
      ]],
    (WITH_PROMPT, without_template, "no chat template", "instruct model"),
    ("train_reward", ours("reward_model_name_or_path", "gemma"), "is a gemma3_text model", "must be a BERT"),
    ("train_reward", lambda p: model(reward_model_name_or_path=str(p.copy("bert", config={"is_decoder": True}))),
     "sets is_decoder: [CLS] would read none of the text behind it"),
    *[("train_reward", model(max_tokens=number), "max_tokens must lie between 5 and 124",
       "128 positions minus 4 virtual tokens", f"got {number}") for number in (2, 125, -1)],
    *[(WITH_PROMPT, model(attn_implementation=name), f"cannot run with attn_implementation {name}: ")
      for name in ("flash_attention_2", "fast")],
    # Adapters
    (WITH_CONTEXTS, empty("reward_adapter"), "plain is not a reward adapter", "no adapter_config.json"),
    (WITH_CONTEXTS, ours("reward_adapter", "policy"), "is not a reward adapter", "CAUSAL_LM"),
    (WITH_CONTEXTS, ours("judge_adapter", "policy"), "is not a reward adapter", "CAUSAL_LM"),
    (WITH_CONTEXTS, model(reward_adapter="/nowhere/gone"), "no such adapter folder: /nowhere/gone"),
    (WITH_CONTEXTS, same_judge, "judge_adapter and reward_adapter are the same", "--judge_share"),
    ("train_policy", model(reward_adapter=...), "one of reward_adapter and reward_function in section model, got none"),
    ("train_policy", model(reward_function="math.fsum"), "one of reward_adapter and reward_function", "got both"),
    *[("train_policy", model(reward_adapter=..., reward_function=path), "reward_function", words) for path, words in [
          ("asks_back", "must be a dotted path such as my_rewards.asks_back, got 'asks_back'"),
          ("no_such_module.asks_back", "no_such_module.asks_back cannot be imported"),
          ("math.asks_back", "math.asks_back cannot be imported"),
          ("there/mine.asks_back", "there and among installed packages)"),
          ("math.pi", "math.pi is a float, not a function"),
      ]],
    *[(WITH_CONTEXTS, saw_all(key), "nothing is left to report on", "are set aside, since", f"{name} ", "split_seed of")
      for key, name in (("reward_adapter", "reward"), ("judge_adapter", "judge"))],
    ("compare", saw_all("policy_adapter"), "nothing is left to report on", "policy "),
    (WITH_ADAPTER, empty("policy_adapter"), "plain is not a policy adapter", "no adapter_config.json"),
    (WITH_ADAPTER, ours("policy_adapter", "reward"), "is not a policy adapter", "SEQ_CLS"),
    (WITH_ADAPTER, made_by_others, "is not a policy adapter made by h2s", "h2s.json"),
    (WITH_ADAPTER, model(policy_adapter=...), "policy_adapter is missing"),
    ("train_policy", going_on_from("reward"), "is not a policy adapter", "SEQ_CLS"),
    *[("train_policy", going_on_from("policy", **keys), f"prefix_adapter brings its own {next(iter(keys))}: leave ")
      for keys in [{"hard_prompt": "Be kind."}, {"hard_prompt_file": "prompt.txt"}, {"model_name_or_path": "a/b"},
                   {"opening_user_message": "start"}, {"chat_template_kwargs": {"enable_thinking": False}}]],
    ("train_dpo", ours("judge_adapter", "policy"), "is not a reward adapter", "CAUSAL_LM"),
    ("train_dpo", saw_all("judge_adapter"), "nothing is left to train on", "judge "),
    ("train_dpo", going_on_from("reward"), "is not a policy adapter", "SEQ_CLS"),
    ("train_dpo", rows([*FIRST, "a <end_of_turn>", "b", 0], *SPREAD), "context 2: the chosen reply spells out"),
    ("train_dpo", rows([*FIRST, "a", "tea " * 1200, 0], *SPREAD), "context 2 and its rejected reply are"),
    # Settings
    *[("train_dpo", task(**settings), words) for settings, words in [
          ({"bf16": True}, "mixed_precision must be no, got bf16"),
          ({"ld_alpha": 0.5}, "ld_alpha cannot be 0.5: it was not run with a prefix"),
          ({"max_length": 512}, "max_length cannot be 512: it cuts replies and drops rows"),
          ({"beta": 0}, "beta must be above 0, got 0"),
          ({"temperature": 0}, "temperature must be above 0, got 0"),
      ]],
    *[(TRAINERS, change, "gradient_checkpointing", "prefix", "leave it off")
      for key in ("gradient_checkpointing", "activation_checkpointing")
      for change in (task(**{key: True}), flags(f"--{key}", "true"))],
    *[("train_policy", task(**settings), *words) for settings, *words in [
          ({"fp16": True}, "fp16 is not supported"),
          ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
          ({"ratio_norm": "sum"}, "ratio_norm"),
          ({"cache_implementation": "offloaded"}, "cache_implementation", "static"),
          ({"temperature": 0}, "temperature must be above 0, got 0"),
          ({"cliprange": 1.5}, "cliprange must be between 0 and 1, got 1.5"),
          ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1, got 0"),
          ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
          ({"eval_max_completion_length": 7}, "eval_max_completion_length must be at least max_completion_length, 8"),
          ({"eval_max_completion_length": 1100}, "context 1 is", "(or eval_max_completion_length)"),
          ({"num_mini_batches": 4, "per_device_train_batch_size": 3}, "num_mini_batches is 4, more than the 3"),
          ({"eval_strategy": "sometimes"}, "sometimes"),
          ({"report_to": "tensorbord"}, "report_to: tensorbord is not supported"),
          ({"lr_scheduler_type": "zigzag"}, "zigzag"),
          ({"per_device_train_batch_size": 1000}, "fewer than the 1000 of one iteration: lower per_device_train_batch"),
          ({"metric_for_best_model": "reward_diference"},
           "metric_for_best_model must be one of soft_reward, hard_reward, reward_difference, "),
          ({"metric_for_best_model": "judge_difference"}, "got judge_difference; those of the judge need a judge_ada"),
      ]],
    *[(WITH_ADAPTER, task(**settings), words) for settings, words in [
          ({"temperature": -1}, "temperature >= 0"),
          ({"top_p": 0}, "0 < top_p <= 1"),
          ({"top_k": -1}, "top_k >= 0"),
          ({"batch_size": 0}, "batch_size must be at least 1"),
          ({"max_completion_length": 0}, "max_completion_length and batch_size must be at least 1"),
      ]],
    ("train_policy", task(reward_weights=[1, 2]), "reward_weights must hold one weight a reward, got 2 for 1"),
    ("compare", task(best_of_n=1), "best_of_n must be 0 or at least 2, got 1"),
    ("compare", task(strengths="0.5,2"), "a strength must be a number from 0, the hard prompt, to 1.5", "got 2.0"),
]  # fmt: skip
CASES = [
    (name, change, words) for names, change, *words in TABLE for name in ([names] if isinstance(names, str) else names)
]


@pytest.mark.parametrize(("name", "change", "words"), CASES, ids=[f"{name}: {words[-1]}" for name, _, words in CASES])
def test_refusal(refused, place, monkeypatch, name, change, words):
    monkeypatch.chdir(place.folder)
    says(refused(name, **(change(place) if callable(change) else change)), *words)


@pytest.mark.parametrize("name", RECIPES)
def test_the_guard_itself(reaches_the_model, name):
    """The recipes that the table changes are right: without a change a model does load."""
    reaches_the_model(name)


@pytest.mark.parametrize("name", ["convert_prompt", *TRAINERS, "compare"])
def test_run_folder_that_exists(refused, tmp_path, name):
    folder = tmp_path / "outputs" / "first"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    line = refused(name, task={"run_name": "first"}, files=2)
    says(line, "first exists: choose another run_name")
    assert ("--resume_from_checkpoint true" in line) == name.startswith("train")
    assert (folder / "adapter_config.json").read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize("name", TRAINERS)
def test_going_on_with_another_split(refused, tmp_path, name):
    (tmp_path / "begun").mkdir()
    model = {"num_virtual_tokens": 4} if name == "train_reward" else {"hard_prompt": HARD_PROMPT}
    text = yaml.safe_dump({"model": model, "dataset": {"split_seed": 9}})
    (tmp_path / "begun" / "recipe.yaml").write_text(text, encoding="utf-8")
    going_on = task(output_dir=str(tmp_path), run_name="begun", resume_from_checkpoint=True)
    says(refused(name, **going_on), "began with split_seed 9, this run has 42: go on with the former")
    assert [f.name for f in (tmp_path / "begun").iterdir()] == ["recipe.yaml"]
