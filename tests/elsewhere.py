"""A Python process that cannot see h2s: what plain PEFT makes of a saved folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FRAME = """
import json, sys
sys.modules["h2s"] = None  # an import of it fails
given = json.load(sys.stdin)
CODE
json.dump(found, sys.stdout)
"""


def elsewhere(code: str, given: Any, folder: Path) -> Any:
    """Run `code` in `folder`: it has `given` (what JSON takes) and leaves its answer in `found`."""
    done = subprocess.run(
        [sys.executable, "-c", FRAME.replace("CODE", code)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
