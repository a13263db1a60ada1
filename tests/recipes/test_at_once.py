"""What is wrong with a recipe's file, and `--help`, are told without the seconds that the libraries take to import."""

import json
import os
import subprocess
import sys

import pytest
from tiny import RECIPES, ROOT

LIBRARIES = ("torch", "accelerate", "peft", "bitsandbytes", "datasets", "pandas", "transformers.training_args")
SETTINGS = ("train_policy", "train_reward", "train_dpo")  # whose help is that of TrainingArguments too
# Runs a recipe once for each of the command lines, and prints what of the libraries it has imported by then.
ONCE_EACH = f"""
import json, runpy, sys
main = runpy.run_path(sys.argv[1])["main"]
for argv in json.loads(sys.argv[2]):
    try:
        main(argv)
    except SystemExit as end:
        print("ended", end.code)
    print("imported", [name for name in {LIBRARIES} if name in sys.modules])
"""
# The recipe as a command, then what is there of all that was imported.
COMMAND = """
import atexit, runpy, sys
atexit.register(lambda: print(*(name for name, module in sys.modules.items() if module), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(*argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_is_refused_at_once(name, tmp_path):
    wrong = {
        "broken": ("model: [", "is not YAML: "),
        "list": ("- model", "expected the sections model, dataset, task, got list"),
        "section": ("modle: {}", "unknown section 'modle'; expected model, dataset, task; did you mean model?"),
        "keys": ("task: 3", "section task: expected keys and values, got int"),
        "prototype": ("task: {bert_name: x}", "has keys of hardPrompt2softPrompt (bert_name)"),
    }
    for case, (text, _) in wrong.items():
        (tmp_path / f"{case}.yaml").write_text(text, encoding="utf-8")
    lines = ["no such recipe: ", *(line for _, line in wrong.values()), "--config: expected one argument"]
    argv = [["--config", str(tmp_path / f"{case}.yaml")] for case in ("missing", *wrong)] + [["--config"]]
    if name not in SETTINGS:
        argv += [["--help"], ["--sed", "1"]]
        lines += ["unknown flag --sed; did you mean --seed?"]
    done = python(ONCE_EACH, str(ROOT / "recipes" / f"{name}.py"), json.dumps(argv))
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith(("ended", "imported"))]
    codes = ["ended 0" if line == ["--help"] else "ended 2" for line in argv]
    assert ends == [line for code in codes for line in (code, "imported []")]
    said = done.stderr.splitlines()
    assert len(said) == len(lines)
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith("error: ") and expected in line


def test_a_push_is_refused_at_once():
    argv = json.dumps([["--help"], [], ["outputs/policy", "--hub_model", "me/kind"]])
    done = python(ONCE_EACH, str(ROOT / "recipes" / "push.py"), argv)
    ends = [line for line in done.stdout.splitlines() if line.startswith(("ended", "imported"))]
    assert ends == [line for code in (0, 2, 2) for line in (f"ended {code}", "imported []")]


@pytest.mark.parametrize("name", SETTINGS)
def test_help_needs_no_models_and_is_the_whole_help(name, recipes, monkeypatch, capsys):
    """Without PEFT, which this process has."""
    script = ROOT / "recipes" / f"{name}.py"
    done = python(COMMAND, str(script), "--config", "missing.yaml", "--help")
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert "transformers.training_args" in imported  # it is seen what is imported
    models = {"peft", "bitsandbytes", "transformers.modeling_utils", "torch._dynamo"}
    assert not imported & {*models, "datasets", "pandas", "scipy", "trl.trainer.reward_trainer"}
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit):
        recipes[name].main(["--help"])
    assert done.stdout == capsys.readouterr().out
    assert "--learning_rate" in done.stdout and "(default: tensorboard)" in done.stdout


def test_help_from_python_leaves_peft_to_its_process():
    """A notebook goes on after it."""
    code = """
import runpy, sys
main = runpy.run_path("recipes/generate.py")["main"]
try:
    main(["--help"])
except SystemExit:
    import peft, h2s
    h2s.SingleStepPPOTrainer
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
