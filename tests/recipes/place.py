"""Where a case puts its files, and the good models and adapters that it damages copies of."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A folder for a case's files; models and adapters that are right."""

    folder: Path
    gemma: Path
    bert: Path
    policy: Path
    reward: Path

    @property
    def trap(self) -> str:
        """A file that only executed input would make."""
        return str(self.folder / "trap")

    def file(self, name: str, content: bytes | str) -> dict:
        """A file as a recipe's data."""
        data = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(data)
        return {"dataset": {"path": str(self.folder / name)}}

    def empty(self, name: str) -> str:
        """A folder with nothing in it."""
        (self.folder / name).mkdir()
        return str(self.folder / name)

    def copy(self, of: str, **changed) -> Path:
        """A copy of a model or adapter folder; `file_json={...}` updates a JSON file of it."""
        folder = self.folder / f"copy-of-{of}"
        shutil.copytree(getattr(self, of), folder, dirs_exist_ok=True)
        for name, values in changed.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
        return folder
