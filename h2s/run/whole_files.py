"""Folders and files that appear whole under their final name, once the disk holds them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED, UNFINISHED_ADAPTER = "unfinished-checkpoint", "unfinished-adapter"


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say what could not be written and how much room there is: torch's and safetensors' own errors do not."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} could not be written ({error}), {free:.0f} MB are free there") from error


def publish(written: Path, final: Path) -> None:
    """Rename a folder once the disk holds all that is in it; one that is there already makes room for it."""
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if final.exists():
        final.rename(written.parent / "replaced")
    written.rename(final)
    _sync(final.parent)


def publish_files(written: Path, folder: Path) -> None:
    """Move each file of a folder into another, replacing those of the same name; each is whole at any time."""
    for file in sorted(written.iterdir()):
        _sync(file)
        file.replace(folder / file.name)
    written.rmdir()
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_unfinished(folder: Path) -> None:
    """Delete what a run was writing when it ended."""
    for name in (UNFINISHED, UNFINISHED_ADAPTER):
        shutil.rmtree(folder / name, ignore_errors=True)
