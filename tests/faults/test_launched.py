"""Two processes as users launch them: a signal to the launcher, and a process that dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
from faults.tiny_runs import ENVIRONMENT
from tiny import ROOT

pytestmark = pytest.mark.faults


@pytest.fixture
def launch(gemma_folder, contexts_file, tmp_path):
    """Launch a policy run of two processes that would not end for long."""
    recipe: list[str] = [str(ROOT / "recipes" / "train_policy.py"), "--model_name_or_path", str(gemma_folder)]
    recipe += ["--path", str(contexts_file), "--hard_prompt", "Be kind.", "--max_completion_length", "4"]
    recipe += ["--per_device_train_batch_size", "4", "--save_steps", "1", "--eval_steps", "1", "--report_to", "none"]
    recipe += ["--disable_tqdm", "true", "--output_dir", ".", "--run_name", "run"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    accelerate += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]

    def start(*flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*accelerate, *recipe, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT,
            start_new_session=True,
        )

    return start


def wait_for_checkpoint(run: subprocess.Popen, folder) -> None:
    while not list(folder.glob("checkpoint-*")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "goes on" in line]


@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_saves_on_all_processes(launch, tmp_path, everyone):
    """Sent to the launcher, or by a scheduler to all: then the launcher passes on what they have already."""
    folder = tmp_path / "run"
    run = launch("--reward_function", "rewards_of_tests.length", "--max_steps", "500")
    wait_for_checkpoint(run, folder)
    (os.killpg if everyone else os.kill)(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    (line,) = lines(said)
    newest = max(int(f.name.rsplit("-", 1)[1]) for f in folder.glob("checkpoint-*"))
    assert f"ended by SIGTERM; run holds checkpoint-{newest}, the kept adapter at its root" in line
    assert not list(folder.glob("unfinished*"))
    names = {f.name for f in (folder / f"checkpoint-{newest}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "value_head.safetensors"} <= names
    goes_on = ["--resume_from_checkpoint", "true", "--max_steps", str(newest + 1)]
    run = launch("--reward_function", "rewards_of_tests.length", *goes_on)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert (folder / f"checkpoint-{newest + 1}").is_dir()


def test_a_process_that_dies_ends_the_run(launch, tmp_path):
    run = launch("--reward_function", "rewards_of_tests.dies", "--max_steps", "500")
    _, said = run.communicate(timeout=200)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert run.returncode != 0
    (line,) = lines(said)
    assert "run holds checkpoint-" in line
    assert "exitcode  : 7" in said  # the launcher's word on the one that died
