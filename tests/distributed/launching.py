"""Recipes launched as users launch them: `accelerate launch` with a file of `accelerate_configs/`."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tiny import ROOT

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",  # where an abort was
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=ENVIRONMENT, check=False)


def launch(processes: int, *command: str, config: str = "cpu", machines: int = 1) -> subprocess.CompletedProcess:
    """Launch a script with a configuration as it is but for the number of processes, the port and each machine's rank.

    Args:
        processes: of all machines together.
        *command: the script and its flags.
        config: the file's name without its suffix.
        machines: launchers that meet over the loopback address.

    Returns:
        The worst exit code, and what all launchers said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    accelerate += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    accelerate += ["--num_processes", str(processes), "--main_process_port", str(port)]
    ranks = [["--machine_rank", str(rank)] if machines > 1 else [] for rank in range(machines)]
    with ThreadPoolExecutor() as launchers:
        done = list(launchers.map(lambda rank: run(*accelerate, *rank, *command), ranks))
    worst = max((d.returncode for d in done), key=abs)
    return subprocess.CompletedProcess(command, worst, "".join(d.stdout for d in done), "".join(d.stderr for d in done))
