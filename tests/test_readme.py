"""README's blocks: run on tiny models, or marked with why not; "From Python" also as it stands (`-m embedded`)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import HARD_PROMPT, ROOT, build_reward_model, contexts, save_gemma, turns
from transformers import AutoTokenizer

from h2s import PrefixTuningPolicyModel
from h2s.run.recipe import PROTOTYPE_KEYS

READMES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*/README.md"))]
README = READMES[0].read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- not run by a test[^:\n]*: [^\n]+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
RUN = {
    "From Python": ["python"] * 3,
    "The Hub": ["bash"],
    "Using an adapter": ["python", "bash"],
    "A dial, and": ["python"],
    "A base in 4": ["bash", "python"],
    "Coming from": ["bash", "python"],
}
REWARD_COMMAND = "python recipes/train_reward.py --config recipes/embedded/reward.yaml"


def section(title):
    return re.split(r"\n##+ ", README.partition(f"# {title}")[2])[0]


def blocks(title):
    return [code for _, _, code in BLOCK.findall(section(title))]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder from which README's relative paths are found, and where outputs may be left."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(recipes, block, *flags):
    """Each line's recipe, with its own flags and then these."""
    for line in block.splitlines():
        python, file, *argv = shlex.split(line)
        assert python == "python" and file == f"recipes/{Path(file).stem}.py"
        recipes[Path(file).stem].main([*argv, *flags])


@pytest.mark.parametrize("file", READMES, ids=lambda f: f.parent.name)
def test_every_block_is_run_or_marked_with_why_not(file):
    text = file.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == len(re.findall(r"^```\w+$", text, re.MULTILINE))
    unmarked = [language for mark, language, _ in found if not mark]
    assert unmarked == ([x for languages in RUN.values() for x in languages] if file == READMES[0] else [])


def test_the_sections_that_are_run_hold_them():
    for title, languages in RUN.items():
        assert [language for _, language, _ in BLOCK.findall(section(title))] == languages, title
    assert [block.count("Trainer(") for block in blocks("From Python")] == [1, 1, 1]
    assert REWARD_COMMAND in section("From Python")


# What README says in passing, and the test that runs it.
ELSEWHERE = {
    REWARD_COMMAND: "test_blocks_run_as_they_stand",
    "python recipes/compare.py --judged anna.xlsx ben.xlsx": "test_compare_then_people_then_reward",
}


def test_commands_within_the_text(recipes, capsys):
    said = re.findall(r"`(python recipes/[^`…]+)`", README.replace("\n", " "))
    for command in set(said) - ELSEWHERE.keys():
        file, *argv = shlex.split(command)[1:]
        with pytest.raises(SystemExit) as stop:
            recipes[Path(file).stem].main(argv)
        assert argv == ["--help"] and stop.value.code in (0, None) and "--learning_rate" in capsys.readouterr().out
    tests = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").rglob("test_*.py"))
    for command, test in ELSEWHERE.items():
        assert command in said and f"def {test}(" in tests


def test_blocks_run_on_tiny_models(checkout, bert_folder, capsys):
    base = save_gemma(checkout / "tiny", positions=4096)
    for folder in ("embedded-reward", "embedded-reward/judge"):
        build_reward_model(bert_folder, seed=len(folder)).save_pretrained(checkout / "outputs" / folder)
    names: dict = {}
    for block in blocks("From Python"):
        assert exec(block.replace("embedded:gemma-3-270m", str(base)), names) is None
    assert capsys.readouterr().out.count("tensor([") == 2
    for folder in ("kind", "kinder", "kind-dpo"):
        reloaded = PrefixTuningPolicyModel.from_pretrained(checkout / "outputs" / folder)
        start = PrefixTuningPolicyModel.from_hard_prompt(str(base), reloaded.prefix.hard_prompt)
        moved = (reloaded.model.prompt_encoder["default"].embedding.weight - soft(start)).abs().max()
        assert moved > 0 and len(reloaded.prefix.seen) == 64, folder
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # DPO begins at ln 2


def soft(policy):
    return policy.model.prompt_encoder["default"].embedding.weight


def test_using_an_adapter(checkout, gemma_folder, recipes, capsys):
    PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT).save_pretrained("outputs/kind")
    plain, command = blocks("Using an adapter")
    names: dict = {}
    exec(plain.replace("chat([", "said = chat(["), names)
    assert names["said"][0]["generated_text"][-1]["role"] == "assistant"
    capsys.readouterr()
    run_commands(recipes, command, "--max_completion_length", "4", "--seed", "1")
    first = capsys.readouterr().out
    assert first.strip()


def test_the_hub(checkout, hub, published, recipes, capsys):
    """As it stands, but for who `user` is, and a base that is small."""
    (commands,) = blocks("The Hub")
    commands = commands.replace("user/", "me/").replace("google/gemma-3-1b-it", str(published["makers/tiny-gemma"]))
    convert, push, generate = commands.splitlines()
    run_commands(recipes, convert)
    run_commands(recipes, push)
    assert hub.repositories["me/kind"].private
    assert capsys.readouterr().out.count(f"pushed to {hub.url}/me/kind\n") == 2
    run_commands(recipes, generate, "--max_completion_length", "4", "--seed", "1")
    assert capsys.readouterr().out.strip()


def test_a_dial_and_several_prefixes(checkout, gemma_folder):
    torch.manual_seed(0)
    for name in ("kind", "kinder"):
        policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)
        with torch.no_grad():
            soft(policy).add_(torch.randn(soft(policy).shape))
        policy.save_pretrained(f"outputs/{name}")
    (block,) = blocks("A dial, and")
    said: list[str] = []
    names: dict = {"print": said.append}
    exec(block, names)
    assert len(said) == 2 and said[0] != said[1]
    start, kind, half = (
        soft(PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)),
        *(soft(PrefixTuningPolicyModel.from_pretrained(f"outputs/{name}")) for name in ("kind", "half-kind")),
    )
    assert torch.allclose(half, (start + kind) / 2, atol=1e-6) and names["policy"].active == "default"


def test_a_base_in_4_bits(checkout, recipes, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base = save_gemma(checkout / "tiny", **sizes)
    commands, python = (block.replace("embedded:gemma-3-270m", str(base)) for block in blocks("A base in 4 bits"))
    run_commands(recipes, commands)
    names: dict = {}
    exec(python, names)
    small = PrefixTuningPolicyModel.from_pretrained("outputs/small")
    assert small.prefix.quantization == names["policy"].prefix.quantization != {}
    assert torch.equal(soft(small), soft(PrefixTuningPolicyModel.from_pretrained("outputs/small-too")))


def test_coming_from_the_prototype(checkout, gemma_folder, bert_folder, recipes, capsys):
    tokenizer = AutoTokenizer.from_pretrained(gemma_folder)
    ids = tokenizer(HARD_PROMPT, add_special_tokens=False).input_ids
    torch.save(
        {"prefix_embeddings_state_dict": torch.randn(len(ids), 32), "prefix_ids": torch.tensor([ids])}, "old.pth"
    )
    contexts(checkout, [{"context": [*turns("assistant"), {"role": "user", "content": f"{n}"}]} for n in range(30)])
    build_reward_model(bert_folder).save_pretrained("outputs/reward")
    commands, call = blocks("Coming from")
    convert, train = commands.replace("google/gemma-3-1b-it", str(gemma_folder)).splitlines()
    run_commands(recipes, convert)
    run_commands(
        recipes, train, "--max_steps", "1", "--max_completion_length", "4", "--per_device_train_batch_size", "4",
        "--report_to", "none", "--run_name", "new"
    )  # fmt: skip
    old, new = (PrefixTuningPolicyModel.from_pretrained(f"outputs/{name}") for name in ("old", "new"))
    assert (soft(old) - soft(new)).abs().max() > 0 and old.prefix.question_prefix == new.prefix.question_prefix != ""
    names: dict = {}
    exec(call, names)
    assert [m["role"] for m in names["history"]] == ["user", "assistant"]


def test_the_table_has_every_key_of_the_prototype():
    rows = [row.split("|")[1] for row in section("Coming from").splitlines() if row.startswith("|")]
    keys = [key for row in rows for key in re.findall(r"`(?:model|dataset|task)\.(?:\w+\.)?(\w+)`", row)]
    ours = {"max_length", "batch_size", "learning_rate", "weight_decay", "max_grad_norm", "temperature"}
    assert sorted(keys) == sorted(PROTOTYPE_KEYS - {"reward_model", "policy_model"} | ours)


@pytest.mark.embedded
def test_blocks_run_as_they_stand(checkout):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = REWARD_COMMAND.replace("python", sys.executable, 1).split()
    subprocess.run([*command, "--num_train_epochs", "1"], env=environment, check=True)
    (checkout / "blocks.py").write_text("\n".join(blocks("From Python")), encoding="utf-8")
    done = subprocess.run([sys.executable, "blocks.py"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensor([" in done.stdout
    assert all(
        (checkout / "outputs" / name / "adapter_model.safetensors").is_file() for name in ("kind", "kinder", "dpo")
    )
