"""The recipe: a YAML file of three sections, checked, then handed to TRL's parser; flags override it."""

import dataclasses
import difflib
import enum
import os
import reprlib
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from trl import TrlParser

from h2s.errors import InputError

SECTIONS = ("model", "dataset", "task")


SECRETS = ("hub_token", "push_to_hub_token")


# Keys that name something to read, which is looked for beside the YAML first.
INPUT_PATHS = (
    "path",
    "hard_prompt_file",
    "model_name_or_path",
    "reward_model_name_or_path",
    "prefix_adapter",
    "policy_adapter",
    "reward_adapter",
    "judge_adapter",
    "judged",
)


class _Loader(yaml.SafeLoader):
    """Safe YAML: plain values, none of them by reference, and no key twice (YAML would silently keep the last)."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*): write the value itself there", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} stands there twice: keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Parser(TrlParser):
    """TRL's parser, whose errors are one line."""

    def error(self, message: str):
        raise InputError(message)


def parse_recipe(model: type, dataset: type, task: type, argv: list[str] | None = None) -> tuple[Any, Any, Any]:
    """Read `--config FILE` and the flags that override it.

    Args:
        model: dataclass of the section `model`.
        dataset: of the section `dataset`.
        task: of the section `task`.
        argv: the command line without the program; `sys.argv` by default.

    Returns:
        An instance of each.

    Raises:
        InputError: an unknown key, one in the wrong section, a wrong type, or a value that a dataclass refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    classes = dict(zip(SECTIONS, (model, dataset, task), strict=True))
    parser = _Parser([model, dataset, task], allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="The recipe's YAML.")
    config = _config_path(argv)
    if config is not None:
        parser.set_defaults_with_config(**_read_settings(config, classes))
    try:
        *sections, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    if unknown:
        keys = [f.name for c in classes.values() for f in dataclasses.fields(c) if f.init]
        raise InputError(f"unknown flag {unknown[0]}{_nearest(unknown[0].lstrip('-'), keys, '--')}")
    return tuple(sections)


def _config_path(argv: list[str]) -> Path | None:
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _nearest(key: str, keys: list[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(key, keys, n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"no such recipe: {path} ({error.strerror})") from error
    except Exception as error:  # whatever the constructors of PyYAML raise: of 2024-13-45, say, a ValueError
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the sections {', '.join(SECTIONS)}, got {type(content).__name__}")
    return content


def read_saved_section(path: Path, section: str) -> dict[str, Any]:
    """A section of the recipe that a run wrote, as it stands; empty where the run left none."""
    values = _read_yaml(path).get(section) if path.is_file() else None
    return values if isinstance(values, dict) else {}


def split_mismatch(path: Path, dataset: Any) -> str | None:
    """What a run that goes on shares out otherwise than it began, by the recipe that it wrote; None if nothing."""
    if not path.is_file():
        return None
    began = read_saved_section(path, "dataset")
    for f in dataclasses.fields(dataset):
        was, now = began.get(f.name, f.default), getattr(dataset, f.name)
        if f.name != "path" and was != now:  # a file may have been moved
            began_with = f"{path.parent} began with {f.name} {was}, this run has {now}"
            return f"{began_with}: go on with the former, or choose another run_name"
    return None


def _read_settings(path: Path, classes: dict[str, type]) -> dict[str, Any]:
    """The YAML as one flat mapping, each key checked to stand in its section and to be of its field's type."""
    content = _read_yaml(path)
    flat: dict[str, Any] = {}
    for section, keys in content.items():
        if section not in SECTIONS:
            near = _nearest(str(section), list(SECTIONS))
            raise InputError(f"{path}: unknown section {section!r}; expected {', '.join(SECTIONS)}{near}")
        if keys is None:
            continue
        if not isinstance(keys, dict):
            raise InputError(f"{path}, section {section}: expected keys and values, got {type(keys).__name__}")
        for key, value in keys.items():
            flat[key] = _checked(path, section, str(key), value, classes)
    return flat


def _checked(path: Path, section: str, key: str, value: Any, classes: dict[str, type]) -> Any:
    fields = {s: {f.name: f for f in dataclasses.fields(c) if f.init} for s, c in classes.items()}
    if key not in fields[section]:
        for other in SECTIONS:
            if key in fields[other]:
                raise InputError(f"{path}, section {section}: {key} belongs in section {other}")
        near = _nearest(key, [k for keys in fields.values() for k in keys])
        raise InputError(f"{path}, section {section}: unknown key {key}{near}")
    hint = typing.get_type_hints(classes[section])[key]
    if not _fits(value, hint):
        got = f"{type(value).__name__} {reprlib.repr(value)}"
        quote = "; put it in quotes" if _fits("", hint) else ""
        raise InputError(f"{path}, section {section}: {key} must be {_name(hint)}, got {got}{quote}")
    if key in INPUT_PATHS and isinstance(value, str):
        beside = str(path.parent / value)
        return beside if os.path.exists(beside) else value
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of a field's type. YAML 1.1 reads 1e-3 as text: a number's text counts as a number."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is Any:
        return True
    if value is None:
        return hint is type(None)
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [e.value for e in hint]
    return isinstance(value, origin or hint)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(hint: Any) -> str:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, args))
    return getattr(hint, "__name__", str(hint))


def write_recipe(path: Path, model: Any, dataset: Any, task: Any) -> None:
    """Write what was run, so that it can be run again: every setting that was chosen, secrets left out.

    What a default instance has on this machine too (`use_cpu` where there is no CUDA) was not chosen: the recipe would
    carry it to another machine.
    """
    content = {}
    for section, values in zip(SECTIONS, (model, dataset, task), strict=True):
        default = type(values)()
        chosen = {}
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if f.init and f.name not in SECRETS and value != getattr(default, f.name):
                value = value.value if isinstance(value, enum.Enum) else value
                if _is_plain(value):
                    chosen[f.name] = value
        content[section] = chosen
    written = path.with_suffix(".unfinished")  # a run that goes on reads it: it is whole or not there
    written.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    written.replace(path)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (str, int, float, bool))
