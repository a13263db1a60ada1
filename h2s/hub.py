"""Adapters on the Hub: download, card, push."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
# All that an adapter consists of; nothing else leaves the machine.
UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "chat_template.jinja",
    "h2s.json",
    "README.md",
)


def adapter_folder(name: str | Path, revision: str | None = None, **download: Any) -> str:
    """A local folder with the adapter: the one named, or the Hub repository's, downloaded.

    Args:
        name: a folder, or a repository `owner/name`.
        revision: branch, tag or commit of the repository.
        **download: `token` and `cache_dir`, as huggingface_hub has them.

    Raises:
        InputError: there is neither, or a link in the folder leads out of it.
    """
    name = str(name)
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
        return snapshot_download(name, revision=revision, allow_patterns=list(ADAPTER_FILES), **download)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{name} is no folder, and the Hub gives no such adapter: {in_short(error)}") from error


def write_card(
    folder: Path, title: str, base_model: str, about: str, report: str, use: str, task: str, tags: list[str]
) -> None:
    """Write `README.md`: what came out of it, what the adapter is, what was measured, and how plain PEFT loads it.

    Args:
        folder: the adapter's.
        title: one line.
        base_model: Hub name of the base, or the folder it was loaded from (only its last part is told).
        about: what it is, Markdown.
        report: what was measured, Markdown; its first paragraph, the verdict, is the card's.
        use: Python code that loads and uses it.
        task: the Hub's pipeline tag.
        tags: beside `h2s` and `prefix-tuning`.
    """
    local = Path(base_model).is_dir()
    data = ModelCardData(
        base_model=None if local else base_model,
        library_name="peft",
        pipeline_tag=task,
        tags=["h2s", "prefix-tuning", *tags],
    )
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, trl, datasets))
    verdict, _, measured = report.strip().partition("\n\n")
    base = f"Base model: {Path(base_model).name if local else base_model}"
    use = f"## Use\n\nPlain PEFT loads it:\n\n```python\n{use}\n```\n\n## Versions\n\n{versions}\n"
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", verdict, base, about, measured, use]
    ModelCard("\n\n".join(part for part in parts if part)).save(folder / "README.md")


class SavedAdapter(ABC):
    """An adapter as it is saved and pushed: what plain PEFT loads, and a card that says what it is."""

    @abstractmethod
    def _save_files(self, folder: str | Path, is_main_process: bool = True) -> None:
        """Write adapter, tokenizer and `h2s.json`."""

    @abstractmethod
    def _write_card(self, folder: Path, report: str, source: str) -> None:
        """Write `README.md`, whose example loads `from_pretrained(source)`."""

    def save_pretrained(self, folder: str | Path, report: str = "", is_main_process: bool = True) -> None:
        """Save what plain PEFT loads: adapter, tokenizer, `h2s.json`, and a card.

        Args:
            folder: made if it is not there.
            report: what was measured, Markdown, for the card.
            is_main_process: where the model is sharded every process calls this, and the main one writes.
        """
        self._save_files(folder, is_main_process)
        if is_main_process:
            self.write_card(folder, report)

    def write_card(self, folder: str | Path, report: str = "") -> None:
        """Write the card alone; its example loads the folder by its name."""
        path = Path(folder).resolve()
        path.mkdir(parents=True, exist_ok=True)
        self._write_card(path, report, f'"{path.name}"')

    def push_to_hub(
        self,
        repo_id: str,
        report: str = "",
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Adapter",
    ) -> str:
        """Upload adapter, tokenizer, `h2s.json` and card in one commit, and nothing else.

        Args:
            repo_id: the repository, made if it is new.
            report: what was measured, Markdown, for the card.
            private: whether a new repository is private.
            token: of the Hub; that of `hf auth login` by default.
            revision: the branch to push to, made if it is new, or a pull request's `refs/pr/…`.
            commit_message: the commit's title.

        Returns:
            The repository's URL.
        """
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        # Only now is it known what the repository is called: one named without its owner is created under one's own.
        source = f'"{url.repo_id}"' if revision is None else f'"{url.repo_id}", revision="{revision}"'
        with TemporaryDirectory() as folder:
            self._save_files(folder)
            self._write_card(Path(folder), report, source)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                allow_patterns=list(UPLOADED),
                revision=revision,
                commit_message=commit_message,
            )
        return str(url)
