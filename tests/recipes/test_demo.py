"""The notebook: clean as it is kept, and run from top to bottom, on a tiny model and (`-m embedded`) as it stands."""

import ast
import json
import os

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from tiny import ROOT, save_gemma

import h2s

NOTEBOOK = ROOT / "recipes" / "demo.ipynb"
EMBEDDED = '"embedded:gemma-3-270m"'
FOUND = """import json

print(json.dumps({
    "difference": difference, "before": before.to_dict("list"), "after": after.to_dict("list"), "said": said,
    "reward": log["reward"].tolist(), "kl": log["kl"].tolist(), "moved": moved.tolist(),
}))"""


def read():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(notebook, folder, threads):
    """What came of it, from where a person opens it: beside `sample_data`."""
    (folder / "sample_data").symlink_to(ROOT / "recipes" / "sample_data")
    there = set(NOTEBOOK.parent.iterdir())
    notebook.cells.append(new_code_cell(FOUND))
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)})
    assert set(NOTEBOOK.parent.iterdir()) == there
    assert (folder / "outputs" / "demo" / "adapter_model.safetensors").is_file()
    (moved,) = [cell for cell in notebook.cells if cell.id == "moved"]
    assert ["image/png" in output.get("data", {}) for output in moved.outputs] == [True]
    found = json.loads(notebook.cells[-1].outputs[0]["text"])
    assert found["before"]["soft"] == found["before"]["hard"] == found["after"]["hard"]
    assert len(found["kl"]) == len(found["reward"]) == 4 and abs(found["kl"][0]) < 1e-4 < abs(found["kl"][3])
    assert min(min(layer) for layer in found["moved"]) > 0
    assert found["said"].strip() == found["after"]["soft"][0].strip() != ""
    return found


def test_it_is_kept_clean():
    """No outputs, no numbers of a run, nothing of an editor's."""
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_uses_the_public_names_alone():
    """And the last part, plain PEFT's, none of them."""
    code = {cell.id: cell.source for cell in read().cells if cell.cell_type == "code"}
    nodes = [node for source in code.values() for node in ast.walk(ast.parse(source))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [name for name in [*modules, *(node.module for node in imported)] if name.startswith("h2s.")]
    names = {alias.name for node in imported if node.module == "h2s" for alias in node.names}
    assert len(names) == 4 and names <= set(h2s.__all__)
    assert not [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert "from peft import" in code["plain"] and "policy" not in code["plain"]


def test_it_runs_on_a_tiny_model(tmp_path):
    notebook, base = read(), save_gemma(tmp_path / "tiny", positions=4096)
    (settings,) = [cell for cell in notebook.cells if cell.id == "settings"]
    assert EMBEDDED in settings.source
    settings.source = settings.source.replace(EMBEDDED, repr(str(base)))
    assert run(notebook, tmp_path, 1)["difference"] < 1e-5


@pytest.mark.embedded
def test_it_runs_as_it_stands(tmp_path):
    found = run(read(), tmp_path, os.cpu_count())
    assert found["difference"] < 1e-4
    assert all(text.strip() for text in found["after"]["soft"])
