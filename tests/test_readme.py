"""README's Python blocks under "From Python": on tiny models, and on the real ones with `-m embedded`."""

import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT, build_reward_model, save_gemma

from h2s import PrefixTuningPolicyModel

README = (ROOT / "README.md").read_text(encoding="utf-8")
FROM_PYTHON = README.split("### From Python")[1].split("### Your files")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", FROM_PYTHON, re.DOTALL)
REWARD_COMMAND = "python recipes/train_reward.py --config recipes/embedded/reward.yaml"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder from which README's relative paths are found, and where outputs may be left."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_three_blocks_are_there():
    assert [block.count("Trainer(") for block in BLOCKS] == [1, 1, 1]
    assert REWARD_COMMAND in FROM_PYTHON


def test_blocks_run_on_tiny_models(checkout, bert_folder, capsys):
    base = save_gemma(checkout / "tiny", positions=4096)
    for folder in ("embedded-reward", "embedded-reward/judge"):
        build_reward_model(bert_folder, seed=len(folder)).save_pretrained(checkout / "outputs" / folder)
    names: dict = {}
    for block in BLOCKS:
        assert exec(block.replace("embedded:gemma-3-270m", str(base)), names) is None
    assert capsys.readouterr().out.count("tensor([") == 1
    for folder in ("kind", "kinder", "dpo"):
        reloaded = PrefixTuningPolicyModel.from_pretrained(checkout / "outputs" / folder)
        start = PrefixTuningPolicyModel.from_hard_prompt(str(base), reloaded.prefix.hard_prompt)
        moved = (reloaded.model.prompt_encoder["default"].embedding.weight - soft(start)).abs().max()
        assert moved > 0 and len(reloaded.prefix.seen) == 64, folder
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # DPO begins at ln 2


def soft(policy):
    return policy.model.prompt_encoder["default"].embedding.weight


@pytest.mark.embedded
def test_blocks_run_as_they_stand(checkout):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = REWARD_COMMAND.replace("python", sys.executable, 1).split()
    subprocess.run([*command, "--num_train_epochs", "1"], env=environment, check=True)
    (checkout / "blocks.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    done = subprocess.run([sys.executable, "blocks.py"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensor([" in done.stdout
    assert all(
        (checkout / "outputs" / name / "adapter_model.safetensors").is_file() for name in ("kind", "kinder", "dpo")
    )
