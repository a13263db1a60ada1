"""A recipe run in forks of a process that has imported everything and computed nothing."""

import importlib.util
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def recipe(name: str) -> Callable:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(
    main: Callable, flags: list[str], log: Path, processes: int = 1, prepare: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Run `main` as so many processes, which find each other as those of `accelerate launch` do.

    `prepare` is called with each one's rank. Stdout is added to `log`, stderr to `log` with the suffix .err. They are a
    process group of their own.

    Returns:
        The exit codes, that of a process which a signal ended being minus the signal.
    """
    together: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            if together:
                os.environ.update(together, WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank))
            _child(main, flags, log, lambda rank=rank: prepare(rank))
        os.setpgid(pids[-1], pids[0])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _child(main: Callable, flags: list[str], log: Path, prepare: Callable[[], None]) -> None:
    code = 1
    try:
        for stream, file in ((1, log), (2, log.with_suffix(".err"))):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        prepare()
        main(flags)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
