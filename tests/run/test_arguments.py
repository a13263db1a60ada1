import pytest

from h2s.errors import InputError
from h2s.run.arguments import (
    CompareArguments,
    CompareDatasetArguments,
    CompareModelArguments,
    DatasetArguments,
    GenerateArguments,
    HardPromptArguments,
    PolicyModelArguments,
    RewardDatasetArguments,
    RewardModelArguments,
    quantization_config,
    read_hard_prompt,
)
from h2s.run.recipe import parse_recipe, write_recipe


def test_hard_prompt_file_of_a_windows_program(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfBe kind,\r\nplease.\r\n")
    assert read_hard_prompt(HardPromptArguments(hard_prompt_file=str(file))) == "Be kind,\nplease."


def test_hard_prompt_is_taken_as_it_is():
    assert read_hard_prompt(HardPromptArguments(hard_prompt=" Be {kind}.\n")) == " Be {kind}.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "expected one of hard_prompt and hard_prompt_file, got none"),
        ({"hard_prompt": "a", "hard_prompt_file": "b"}, "expected one of hard_prompt and hard_prompt_file, got both"),
        ({"hard_prompt": "", "hard_prompt_file": "b"}, "got both"),
        ({"hard_prompt": ""}, "the hard prompt is empty"),
        ({"hard_prompt": " \n"}, "the hard prompt is empty"),
        ({"hard_prompt_file": "empty.txt"}, "the hard prompt is empty"),
        ({"hard_prompt_file": "no/such/file"}, "hard_prompt_file cannot be read: .*no/such/file"),
        ({"hard_prompt_file": "."}, "hard_prompt_file cannot be read"),
        ({"hard_prompt_file": "a\0b"}, "hard_prompt_file cannot be read"),
        ({"hard_prompt_file": "Be kind. " * 600}, "hard_prompt_file cannot be read"),
        ({"hard_prompt_file": "latin.txt"}, "hard_prompt_file cannot be read: .*utf-8"),
    ],
)
def test_hard_prompts_that_are_none(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match=words):
        read_hard_prompt(HardPromptArguments(**arguments))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"load_in_4bit": False}, None),
        ({"load_in_4bit": True}, ("nf4", False)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}, ("fp4", True)),
    ],
)
def test_4_bits_as_trl_names_them(given, expected):
    config = quantization_config(HardPromptArguments(**given))
    assert (config and (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)) == expected
    assert config is None or config.load_in_4bit


@pytest.mark.parametrize(
    "given", [{"bnb_4bit_quant_type": "nf4"}, {"use_bnb_nested_quant": True, "load_in_4bit": False}]
)
def test_settings_of_4_bits_that_are_not_asked_for(given):
    with pytest.raises(InputError, match=rf"^{next(iter(given))} would have no effect without load_in_4bit: true$"):
        quantization_config(HardPromptArguments(**given))


def test_require():
    assert DatasetArguments(path="a.json").require("path", "dataset") == "a.json"
    for missing in (None, ""):
        with pytest.raises(InputError, match=r"^path is missing: set it in section dataset .* or with --path"):
            DatasetArguments(path=missing).require("path", "dataset")


@pytest.mark.parametrize("adapter", [None, "outputs/reward"])
@pytest.mark.parametrize("function", [None, "my_rewards.length"])
def test_one_reward(adapter, function):
    arguments = PolicyModelArguments(reward_adapter=adapter, reward_function=function)
    if (adapter is None) != (function is None):
        arguments.check_reward()
        return
    given = "both" if adapter else "none"
    words = f"expected one of reward_adapter and reward_function in section model, got {given}"
    with pytest.raises(InputError, match=words):
        arguments.check_reward()


def test_which_contexts_are_compared():
    assert CompareDatasetArguments(test_size=0.3).which_contexts() == (
        "The contexts are the test part by test_size 0.3 and split_seed 42."
    )
    assert CompareDatasetArguments(split="all").which_contexts() == "The contexts are all of the file."


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0"),
        ({"temperature": float("nan")}, "expected temperature >= 0"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"batch_size": 0}, "max_completion_length and batch_size must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length and batch_size must be at least 1"),
        ({"best_of_n": 1}, "best_of_n must be 0 or at least 2, got 1"),
        ({"best_of_n": -2}, "best_of_n must be 0 or at least 2, got -2"),
    ],
)
def test_sampling_that_is_none(settings, words):
    """Of generate.py and, where it has the setting, of compare.py."""
    for arguments in (GenerateArguments, CompareArguments):
        if set(settings) <= set(arguments.__dataclass_fields__):
            with pytest.raises(InputError, match=words):
                arguments(**settings)


@pytest.mark.parametrize("language", ["fr", "zh", "EN"])
def test_language_that_is_none(language):
    sections = (CompareModelArguments, CompareDatasetArguments, CompareArguments)
    with pytest.raises(
        InputError, match=rf"--language: invalid choice: '{language}' \(choose from '?en'?, '?zh-TW'?\)"
    ):
        parse_recipe(*sections, ["--language", language])


def test_sampling_at_its_limits():
    limits = {"temperature": 0, "top_p": 1, "top_k": 0, "batch_size": 1, "max_completion_length": 1}
    for number in (0, 2):
        assert CompareArguments(**limits, best_of_n=number).best_of_n == number


def test_strengths(tmp_path):
    """As one flag and in YAML, as a list or the same text; what a run's own recipe says can be run again."""
    sections = (CompareModelArguments, CompareDatasetArguments, CompareArguments)
    assert parse_recipe(*sections, [])[2].strengths is None
    assert parse_recipe(*sections, ["--strengths", "0.5,1, 1.5"])[2].strengths == [0.5, 1, 1.5]
    assert parse_recipe(*sections, ["--strengths", "0"])[2].strengths == [0]
    for written in ("0.5,1,1.5", "[0.5, 1, 1.5]", "['0.5', 1, 15e-1]"):
        (tmp_path / "r.yaml").write_text(f"task: {{strengths: {written}}}", encoding="utf-8")
        if written[0] != "[":
            (tmp_path / "r.yaml").write_text(f"task: {{strengths: '{written}'}}", encoding="utf-8")
        run = parse_recipe(*sections, ["--config", str(tmp_path / "r.yaml")])
        assert run[2].strengths == [0.5, 1, 1.5]
    write_recipe(tmp_path / "recipe.yaml", *run)
    assert parse_recipe(*sections, ["--config", str(tmp_path / "recipe.yaml")])[2] == run[2]


def test_several_paths(tmp_path):
    """As flags and in YAML, where one may be a text; each is looked for beside the recipe first."""
    classes = (RewardModelArguments, RewardDatasetArguments, GenerateArguments)
    assert parse_recipe(*classes, ["--path", "a.xlsx", "b.csv"])[1].path == ["a.xlsx", "b.csv"]
    (tmp_path / "a.xlsx").touch()
    for written, read in (
        ("a.xlsx", str(tmp_path / "a.xlsx")),
        ("[a.xlsx, b.csv]", [str(tmp_path / "a.xlsx"), "b.csv"]),
    ):
        (tmp_path / "r.yaml").write_text(f"dataset: {{path: {written}}}", encoding="utf-8")
        assert parse_recipe(*classes, ["--config", str(tmp_path / "r.yaml")])[1].path == read


def test_columns_and_labels_are_mappings(tmp_path):
    classes = (RewardModelArguments, RewardDatasetArguments, GenerateArguments)
    flags = ["--labels", '{"A": 0}', "--columns", '{"human_eval": "Winner"}']
    dataset = parse_recipe(*classes, flags)[1]
    assert (dataset.labels, dataset.columns) == ({"A": 0}, {"human_eval": "Winner"})
    (tmp_path / "r.yaml").write_text("dataset: {labels: {A: 0, 1: 1}, sheet: x}", encoding="utf-8")
    assert parse_recipe(*classes, ["--config", str(tmp_path / "r.yaml")])[1].labels == {"A": 0, 1: 1}
    with pytest.raises(InputError, match="labels must be a mapping as JSON"):
        parse_recipe(*classes, ["--labels", "A=0"])
