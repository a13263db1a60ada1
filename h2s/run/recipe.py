"""The recipe: a YAML file of three sections, checked, then handed to TRL's parser; flags override it."""

import dataclasses
import difflib
import enum
import os
import pkgutil
import reprlib
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from trl import TrlParser

from h2s.errors import InputError, in_short
from h2s.run.arguments import NO_DEVICE_MAP

SECTIONS = ("model", "dataset", "task")
RECIPE_FILE = "recipe.yaml"  # in a run's folder: what was run
SECRETS = ("hub_token", "push_to_hub_token")
# Keys that name something to read, which is looked for beside the YAML first.
INPUT_PATHS = (
    "path",
    "hard_prompt_file",
    "model_name_or_path",
    "reward_model_name_or_path",
    "legacy_checkpoint",
    "prefix_adapter",
    "policy_adapter",
    "reward_adapter",
    "judge_adapter",
    "judged",
)
OTHER_PATHS = ("output_dir", "reward_function")
HOW_IT_RUNS = ("dtype", "attn_implementation")  # a resumed run may have others
# Keys of hardPrompt2softPrompt's YAML that are no recipe's here.
PROTOTYPE_KEYS = {
    *("reward_model", "reward_model_path", "bert_name", "prefix_length", "PPO_mode", "tokenizer_max_length"),
    *("policy_model", "policy_model_path", "policy_model_name", "prefix_prompt", "min_response_length"),
    *("grad_checkpointing", "torch_dtype", "data_path", "split_ratio", "root_path", "num_epoch", "batch_size_train"),
    *("batch_size_eval", "mini_batch", "sample_loop", "max_lr", "pct_start", "anneal_strategy", "clip_epsilon"),
    *("max_kl", "valueL_coef", "klL_coef", "entropyL_coef", "use_kl", "device", "output_path"),
}
# PyYAML's own, and what its constructors raise: of 2024-13-45 a ValueError, of `!!bool many` a KeyError.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class _StrictSafeLoader(yaml.SafeLoader):
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
        raise InputError(" ".join(message.split()))


def parse_recipe(
    model: type, dataset: type, task: type | str, argv: list[str] | None = None, **defaults: Any
) -> tuple[Any, Any, Any]:
    """Read `--config FILE` and the flags that override it.

    What the file alone can be refused for is refused before `task` is imported, which takes seconds.

    Args:
        model: dataclass of the section `model`.
        dataset: of the section `dataset`.
        task: of the section `task`, or where it is: `package.module:class`.
        argv: the command line without the program; `sys.argv` by default.
        defaults: what this recipe uses in place of a dataclass's default, where neither YAML nor flag sets the key.

    Returns:
        An instance of each.

    Raises:
        InputError: an unknown key, one in the wrong section, a wrong type, or a value that a dataclass refuses.
    """
    own_command, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    early = _Parser([], add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("-h", "--help", action="store_true")
    given = early.parse_known_args(argv)[0]
    path = None if given.config is None or given.help else Path(given.config).expanduser()
    content = {} if path is None else _read_sections(path)
    if own_command and given.help:
        # transformers' settings import PEFT where it is there, and PEFT all models: seconds, for a process that ends
        # with its help. None is Python's own mark of a module that cannot be imported.
        sys.modules.setdefault("peft", None)  # type: ignore[arg-type]
    classes = [model, dataset, pkgutil.resolve_name(task) if isinstance(task, str) else task]
    fields = {}
    for section, cls in zip(SECTIONS, classes, strict=True):
        hints = typing.get_type_hints(cls)
        fields.update({f.name: (section, hints[f.name]) for f in dataclasses.fields(cls) if f.init})
    parser = _Parser(classes, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="The recipe's YAML.")
    parser.set_defaults(**defaults)
    if path is not None:
        parser.set_defaults(**_read_settings(path, content, fields, parser))
    *sections, _ = _parse_flags(parser, argv, fields)
    return tuple(sections)


def parse_command(settings: type, argv: list[str] | None = None, **positional: str) -> tuple[Any, ...]:
    """Read the command line of what is no recipe: no YAML, no sections.

    Args:
        settings: dataclass of the flags.
        argv: the command line without the program; `sys.argv` by default.
        **positional: what stands there without a flag: its name and its help.

    Returns:
        An instance of `settings`, and the positional values in order.

    Raises:
        InputError: an unknown flag, a wrong type, or a positional value is missing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser([settings], allow_abbrev=False)
    for name, help_text in positional.items():
        parser.add_argument(name, help=help_text)
    parsed, rest = _parse_flags(parser, argv, [f.name for f in dataclasses.fields(settings)])
    return parsed, *(getattr(rest, name) for name in positional)


def _parse_flags(parser: _Parser, argv: list[str], known: Iterable[str]) -> list[Any]:
    """An instance of each of the parser's dataclasses, and a namespace of what belongs to none."""
    try:
        # No .args file: one beside the recipe would set flags unseen.
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(in_short(error)) from error
    for values in parsed:
        for name in (*INPUT_PATHS, *OTHER_PATHS):
            if hasattr(values, name):
                setattr(values, name, _at_home(getattr(values, name)))
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}{_nearest(unknown[0].lstrip('-'), known, '--')}")
    return parsed


def _nearest(key: str, keys: Iterable[str], dashes: str = "") -> str:
    if key.startswith("device_map"):
        return f": {NO_DEVICE_MAP}"
    close = difflib.get_close_matches(key, keys, n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictSafeLoader)
    except OSError as error:
        raise InputError(f"no such recipe: {path} ({error.strerror})") from error
    except YAML_ERRORS as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected the sections {', '.join(SECTIONS)}, got {type(content).__name__}")
    return content


def resume_mismatch(path: Path, model: Any, dataset: Any) -> str | None:
    """Compare a resumed run's model and split with what the run's recipe records: the first difference, or None."""
    if not path.is_file():
        return None
    recorded = _read_yaml(path)
    for section, values in (("model", model), ("dataset", dataset)):
        saved = recorded.get(section) or {}
        for f in dataclasses.fields(values):
            was, now = saved.get(f.name, f.default), getattr(values, f.name)
            if f.name == "reward_function" and was and now:
                was, now = os.path.basename(was), os.path.basename(now)
            if f.name not in (*INPUT_PATHS, *HOW_IT_RUNS) and was != now:  # a file may have been moved
                began_with = f"{path.parent} began with {f.name} {was}, this run has {now}"
                return f"{began_with}: go on with the former, or choose another run_name"
    return None


def _read_sections(path: Path) -> dict[str, dict]:
    """Read the YAML's sections, none of them unknown; what keys they may have is checked later."""
    content = _read_yaml(path)
    named = {str(key) for keys in content.values() if isinstance(keys, dict) for key in keys}
    if prototypes := sorted(named & PROTOTYPE_KEYS):
        raise InputError(
            f"{path} has keys of hardPrompt2softPrompt ({', '.join(prototypes)}): README's table \"Coming from "
            'hardPrompt2softPrompt" says where each is now'
        )
    for section, keys in content.items():
        if section not in SECTIONS:
            near = _nearest(str(section), SECTIONS)
            raise InputError(f"{path}: unknown section {section!r}; expected {', '.join(SECTIONS)}{near}")
        if not isinstance(keys, dict | None):
            raise InputError(f"{path}, section {section}: expected keys and values, got {type(keys).__name__}")
    return {section: keys or {} for section, keys in content.items()}


def _read_settings(
    path: Path, content: dict[str, dict], fields: dict[str, tuple[str, Any]], parser: _Parser
) -> dict[str, Any]:
    """Read the sections as one flat mapping, each key in its section, each value as its flag would give it."""
    flat: dict[str, Any] = {}
    for section, keys in content.items():
        where = f"{path}, section {section}"
        for key, value in keys.items():
            home, hint = fields.get(str(key), (None, None))
            if home is None:
                raise InputError(f"{where}: unknown key {key}{_nearest(str(key), fields)}")
            if home != section:
                raise InputError(f"{where}: {key} belongs in section {home}")
            try:
                value = _parse_value(parser, key, value, hint)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            if key in INPUT_PATHS:
                value = _found(value, path.parent)
            elif key == "reward_function" and isinstance(value, str):
                value = _found_module(value, path.parent)
            flat[key] = value
    return flat


def _found(value: Any, folder: Path) -> Any:
    """An input's path, or several, in the recipe's own folder where it is there."""
    if isinstance(value, list):
        return [_found(v, folder) for v in value]
    beside = isinstance(value, str) and os.path.exists(folder / value)
    return str(folder / value) if beside else value


def _found_module(path: str, folder: Path) -> str:
    """A Python callable's dotted path, in the recipe's own folder where its module is there."""
    given, dotted = os.path.split(path)
    module = (folder / given).joinpath(*dotted.split(".")[:-1])
    beside = module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()
    return str(folder / path) if beside else path


def _at_home(value: Any) -> Any:
    """A path, or several, with `~` as the home folder, as a shell has it."""
    if isinstance(value, list):
        return [_at_home(v) for v in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _kinds(hint: Any) -> list[Any]:
    """List what a field takes: of `list[str] | Literal[False] | None`, list[str], False and None's type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, Literal):
        return [kind for option in typing.get_args(hint) for kind in _kinds(option)]
    return [hint]


def _parse_value(parser: _Parser, key: str, value: Any, hint: Any) -> Any:
    """Take a YAML value of the field's own type as it is; have argparse parse text, as it would a flag's.

    Any other is refused, for YAML has changed what was written: 007 into 7, no into False.
    """
    kinds = _kinds(hint)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    fits = any(type(value) is kind or value == kind for kind in plain) or (type(value) is int and float in plain)
    is_text = isinstance(value, str) and value != "--"  # Python 3.11's argparse loses a lone --
    if not fits and not (is_text and {int, bool, list, dict}.isdisjoint(plain)):  # 1e-3 is text in YAML 1.1
        names = " or ".join(k.__name__ if isinstance(k, type) else repr(k) for k in plain if k is not type(None))
        quote = "; put it in quotes" if str in plain else ""
        raise InputError(f"{key} must be {names}, got {type(value).__name__} {reprlib.repr(value)}{quote}")
    if isinstance(value, list):
        (element,) = next(typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is list)
        return [_parse_value(parser, key, v, element) for v in value]
    if not is_text:
        return value
    parsed = getattr(parser.parse_args([f"--{key}={value}"]), key)
    return parsed[0] if isinstance(parsed, list) else parsed  # a flag that takes several gives a list of this one


class _Dumper(yaml.SafeDumper):
    """Safe YAML for `_StrictSafeLoader`: no aliases, enumerations by their value, dataclasses by their fields."""

    def ignore_aliases(self, data):
        return True


_Dumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
_Dumper.add_multi_representer(object, lambda dumper, config: dumper.represent_data(dataclasses.asdict(config)))


def write_recipe(path: Path, model: Any, dataset: Any, task: Any, **defaults: Any) -> None:
    """Write what was run, so that it can be run again: every setting that was chosen, secrets left out.

    What a default instance has on this machine too (`use_cpu` where there is no CUDA) was not chosen: the recipe would
    carry it to another machine. A key of `defaults`, those that `parse_recipe` was given, is always written.
    """
    content = {}
    for section, values in zip(SECTIONS, (model, dataset, task), strict=True):
        default = type(values)()
        chosen = {}
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if f.init and f.name not in SECRETS and (value != getattr(default, f.name) or f.name in defaults):
                chosen[f.name] = value
        content[section] = chosen
    written = path.with_suffix(".unfinished")  # a run that resumes reads it: it is whole or not there
    written.write_text(yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False), encoding="utf-8")
    written.replace(path)
