"""Adapters on the Hub: download, card, push."""

import json
import logging
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import datasets
import peft
import torch
import transformers
import trl
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from h2s.errors import InputError, PushError, in_short
from h2s.models import tensor_shapes

logger = logging.getLogger(__name__)

# What is read of an adapter. Nothing in it is a pickle or a program.
ADAPTER_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
# All that an adapter consists of; nothing else leaves the machine.
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
NEEDED = (CONFIG, WEIGHTS, "tokenizer_config.json", "h2s.json", CARD)
UPLOADED = (*NEEDED, "tokenizer.json", "special_tokens_map.json", "vocab.txt", "chat_template.jinja")
USE = "\n## Use\n"  # the card's heading; what loads the adapter stands below it, and nowhere else
BASE = re.compile(r"^Base model: .*$", re.MULTILINE)
LOADS = re.compile(r'\.from_pretrained\("[^"]*"(, revision="[^"]*")?')


class PushSettings(Protocol):
    """Where a push goes, by the names of transformers' `TrainingArguments`."""

    hub_model_id: str | None
    hub_private_repo: bool | None
    hub_token: str | None
    hub_revision: str | None


def adapter_folder(name: str | Path, revision: str | None = None, **download: Any) -> str:
    """A local folder with the adapter: the one named, or the Hub repository's, downloaded.

    Args:
        name: a folder, or a repository `owner/name` or `owner/name@revision`.
        revision: branch, tag or commit of the repository.
        **download: `token` and `cache_dir`, as huggingface_hub has them.

    Raises:
        InputError: there is neither, a link in the folder leads out of it, or two revisions are named.
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
    repo_id, at, named = name.partition("@")
    if repo_id.count("/") != 1 or name[:1] in "./~" or (at and not named):
        raise InputError(f"no such adapter folder: {name}")
    if at and revision not in (None, named):
        raise InputError(f"{name} names a revision, and revision is {revision}: give one of the two")
    try:
        revision = named if at else revision
        return snapshot_download(repo_id, revision=revision, allow_patterns=list(ADAPTER_FILES), **download)
    except Exception as error:  # of the HTTP client, whose errors huggingface_hub does not wrap, too
        raise InputError(f"{name} is no folder, and the Hub gives no such adapter: {in_short(error)}") from error


def hub_name(base: str) -> tuple[str, str | None] | None:
    """The name by which anybody loads a base model, and the commit where it is known.

    Of a folder it is known in the Hub's own cache alone: `_name_or_path` in a config.json may be the model that this
    one was made from.

    Args:
        base: a name on the Hub, or the folder that the model was loaded from.

    Returns:
        None where only a folder of this machine is known.
    """
    folder = Path(base)
    if folder.is_dir():
        kind, *name = folder.parents[1].name.split("--") if folder.parent.name == "snapshots" else [""]
        return ("/".join(name), folder.name) if kind == "models" and name else None
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base, None


def short_name(adapter: str) -> str:
    """What an adapter is called: its folder or repository, without owner, revision and the cache's own folders."""
    folder = Path(adapter)
    known = hub_name(adapter) if folder.is_dir() else (adapter.partition("@")[0], None)
    return Path(known[0] if known else folder).name


def public_name(base: str) -> tuple[str, str | None]:
    """As [`hub_name`].

    Raises:
        InputError: there is none.
    """
    known = hub_name(base)
    if known is None:
        raise InputError(
            f"cannot be pushed: the base model is a folder of this machine, {base}, and nobody else could load the "
            "adapter; give the base by its name on the Hub (google/gemma-3-1b-it, say), in an adapter that is there "
            f"already as base_model_name_or_path of its {CONFIG}"
        )
    return known


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
    known = hub_name(base_model)
    on_hub = {"base_model": known[0], "base_model_relation": "adapter"} if known else {}
    data = ModelCardData(library_name="peft", pipeline_tag=task, tags=["h2s", "prefix-tuning", *tags], **on_hub)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft, trl, datasets))
    verdict, _, measured = report.strip().partition("\n\n")
    base = f"Base model: {known[0] if known else Path(base_model).name}"
    use = f"{USE.strip()}\n\nPlain PEFT loads it:\n\n```python\n{use}\n```\n\n## Versions\n\n{versions}\n"
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", verdict, base, about, measured, use]
    ModelCard("\n\n".join(part for part in parts if part)).save(folder / CARD)


def check_push(settings: PushSettings, base: str, name: str | None, suffixes: Iterable[str] = ("",)) -> None:
    """Check before a run begins what would fail at its end: repository, base model and token.

    That the Hub cannot be reached now is told and no more: the run may be offline until then.

    Args:
        settings: where the push goes.
        base: the base model's folder or Hub name.
        name: of the repository where the settings have none; None is a timestamp.
        suffixes: what the names of the run's repositories end in.

    Raises:
        InputError: the repository has no valid name, nobody else could load the base, or the token is not valid.
    """
    for suffix in suffixes:
        check_repository(f"{settings.hub_model_id or name or 'timestamp'}{suffix}")
    public_name(base)
    try:
        HfApi(token=settings.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise InputError("a push needs a token: `hf auth login`, HF_TOKEN in the environment, or hub_token") from error
    except Exception as error:  # of httpx, which huggingface_hub does not wrap, too
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise InputError(f"the token for the push is not valid: {in_short(error)}") from error
        logger.warning("the Hub cannot be asked now whether the token is valid: %s", in_short(error))


def check_repository(repo_id: str) -> None:
    """Check a repository's name.

    Raises:
        InputError: no repository can have it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"hub_model_id cannot be {repo_id}: {in_short(error)}") from error


def push_folders(folders: Mapping[Path, str], settings: PushSettings, commit_message: str = "Adapter") -> list[str]:
    """Upload adapters as they lie in their folders, each to a repository of its own.

    Args:
        folders: each adapter's folder, and its repository.
        settings: the rest of where the push goes.
        commit_message: the commits' title.

    Returns:
        The repositories' URLs.

    Raises:
        InputError: one is no adapter, or nobody else could load it.
        PushError: the Hub does not take one. The message holds the command that pushes what is not pushed yet.
    """
    urls: list[str] = []
    for folder, repo_id in folders.items():
        private, token, revision = settings.hub_private_repo, settings.hub_token, settings.hub_revision
        try:
            urls.append(push_folder(folder, repo_id, private, token, revision, commit_message))
            logger.info("pushed to %s", urls[-1])
        except PushError as error:
            left = list(folders.items())[len(urls) :]
            commands = " && ".join(_push_command(folder, repo_id, settings) for folder, repo_id in left)
            raise PushError(f"{error}; all is saved, and this pushes it: {commands}") from error.__cause__
    return urls


def _push_command(folder: Path, repo_id: str, settings: PushSettings) -> str:
    """The line that repeats a push, without the token."""
    words = ["python", "recipes/push.py", str(folder), "--hub_model_id", repo_id]
    if settings.hub_private_repo is not None:
        words += ["--hub_private_repo", str(settings.hub_private_repo).lower()]
    if settings.hub_revision is not None:
        words += ["--hub_revision", settings.hub_revision]
    return shlex.join(words)


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Adapter",
) -> str:
    """Upload an adapter as it lies in its folder, in one commit, and nothing else; as [`SavedAdapter.push_to_hub`].

    On the way, and not in the folder, the configuration and the card are written anew: they name the base model as
    others load it, and the card's example names the repository.
    """
    check_repository(repo_id)
    for name in NEEDED:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not an adapter made by h2s: there is no {name} in it")
    adapter_folder(folder)  # no link in it leads out
    tensor_shapes(folder / WEIGHTS)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, revision_of_base = str(config["base_model_name_or_path"]), config.get("revision")
        card = ModelCard.load(folder / CARD)
    except (ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{folder} is not an adapter made by h2s: {in_short(error)}") from error
    base, commit = public_name(base)
    config |= {"base_model_name_or_path": base, "revision": commit or revision_of_base}
    card.data.base_model, card.data.base_model_relation = base, "adapter"
    about, heading, use = card.text.rpartition(USE)
    about = BASE.sub(lambda _: f"Base model: {base}", about, count=1)
    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        # Only now is it known what the repository is called: one named without its owner is created under one's own.
        source = f'.from_pretrained("{url.repo_id}"' + ("" if revision is None else f', revision="{revision}"')
        card.text = about + heading + LOADS.sub(lambda _: source, use)
        anew = {CONFIG: json.dumps(config, indent=2).encode(), CARD: str(card).encode()}
        files = [name for name in UPLOADED if (folder / name).is_file()]
        operations = [CommitOperationAdd(name, anew.get(name, folder / name)) for name in files]
        api.create_commit(url.repo_id, operations, commit_message=commit_message, revision=revision)
    except Exception as error:  # of httpx, which huggingface_hub does not wrap, too
        raise PushError(f"not pushed to {repo_id}: {in_short(error)}") from error
    return str(url)


class SavedAdapter(ABC):
    """An adapter as it is saved and pushed: what plain PEFT loads, and a card that says what it is.

    Attributes:
        model: the plain PEFT model.
    """

    model: peft.PeftModel

    @property
    def base_model(self) -> str:
        """The base model's folder or Hub name."""
        return self.model.peft_config["default"].base_model_name_or_path

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

        Raises:
            InputError: the base model is a folder of this machine, so nobody else could load the adapter.
            PushError: the Hub cannot be reached, or does not take it; `__cause__` is huggingface_hub's own error.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, report)
            return push_folder(Path(folder), repo_id, private, token, revision, commit_message)
