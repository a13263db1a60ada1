"""Adapters on the Hub: download, card, push."""

import os
import re
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from h2s.errors import InputError, in_short

# What is read of an adapter. Nothing in it is a pickle or a program.
ADAPTER_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def adapter_folder(name: str) -> str:
    """A local folder with the adapter: the one named, or the Hub repository's, downloaded.

    Raises:
        InputError: there is neither, or a link in the folder leads out of it.
    """
    if os.path.isdir(name):
        folder = Path(name).resolve()
        # The Hub's own cache keeps a repository's files beside its snapshots and links them.
        inside = folder.parents[1] if folder.parent.name == "snapshots" else folder
        for file in (f for pattern in ADAPTER_FILES for f in folder.glob(pattern)):
            if not file.resolve().is_relative_to(inside):
                raise InputError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")
        return str(folder)
    if name.count("/") != 1 or name[:1] in "./~":
        raise InputError(f"no such adapter folder: {name}")
    try:
        return snapshot_download(name, allow_patterns=list(ADAPTER_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{name} is no folder, and the Hub gives no such adapter: {in_short(error)}") from error


# All that an adapter consists of; nothing else of a run's folder leaves the machine. The card goes last: a repository
# that has one is complete.
UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "chat_template.jinja",
    "h2s.json",
)


POLICY_USE = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat([{{"role": "user", "content": "…"}}])
```"""


REWARD_USE = """```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("{name}", num_labels=1)
tokenizer = AutoTokenizer.from_pretrained("{name}")
model(**tokenizer("the context", "the response", return_tensors="pt")).logits
```"""


# What a card's code loads: its first argument, and the revision if it was pushed to one.
LOADED = re.compile(r'\.from_pretrained\("[^"]*"(, revision="[^"]*")?')


def write_card(folder: Path, title: str, base_model: str, body: str, reward: bool = False) -> None:
    """Write `README.md`: what the adapter is, how it was made and measured, and how plain PEFT loads it.

    Args:
        folder: the run's folder.
        title: one line.
        base_model: Hub name of the base, or the folder it was loaded from (only its last part is told).
        body: what was measured, Markdown.
        reward: whether it is a reward adapter.
    """
    local = Path(base_model).is_dir()
    data = ModelCardData(
        base_model=None if local else base_model,
        library_name="peft",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["h2s", "prefix-tuning", "reward-model" if reward else "ppo"],
    )
    use = (REWARD_USE if reward else POLICY_USE).format(name=folder.name)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, trl, datasets))
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nBase model: {Path(base_model).name if local else base_model}\n\n"
        f"{body}\n\n## Use\n\nPlain PEFT loads it:\n\n{use}\n\n## Versions\n\n{versions}\n"
    )
    ModelCard(text).save(folder / "README.md")


def push_adapter(
    folder: Path, hub_model_id: str | None, private: bool | None, token: str | None, revision: str | None = None
) -> str:
    """Upload the adapter by allow-list, its card last; the card then loads what was pushed.

    Args:
        folder: the run's folder, with the card that `write_card` wrote.
        hub_model_id: the repository; the folder's name under one's own account if None.
        private: whether a new repository is private.
        token: of the Hub.
        revision: the branch to push_adapter to, made if it is new, or a pull request's `refs/pr/…`.

    Returns:
        The repository's URL.
    """
    api = HfApi(token=token)
    url = api.create_repo(hub_model_id or folder.name, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    # Only now is it known what the repository is called: one named without its owner is created under one's own.
    card = folder / "README.md"
    source = f'"{url.repo_id}"' if revision is None else f'"{url.repo_id}", revision="{revision}"'
    text = LOADED.sub(lambda _: f".from_pretrained({source}", card.read_text(encoding="utf-8"))
    card.write_text(text, encoding="utf-8")
    for patterns in (list(UPLOADED), ["README.md"]):
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=patterns,
            revision=revision,
            commit_message="Adapter" if len(patterns) > 1 else "Card",
        )
    return str(url)
