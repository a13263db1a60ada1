"""Several soft prefixes of one hard prompt in one model, and a dial for how far each goes from it.

All that began as one hard prompt are keys and values at the same places, so a point between it and a prefix is a
prefix too. Other prompts' are not taken: the tokenizer's chat template leaves out one prompt, and would be silently
wrong for another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch.distributed.tensor import DTensor

from h2s.errors import InputError
from h2s.hub import hub_name
from h2s.prefix.adapter import (
    HARD,
    SOFT,
    add_hard_prompt,
    add_prefix,
    hard_prefix,
    hard_prompt_active,
    load_prefix,
    soft_prefix,
)
from h2s.prefix.chat_template import ChatPrefix
from h2s.prefix.opened import OpenedPolicy, open_adapter
from h2s.run.strengths import check_strength

# What the chat template and the tokens in front of a conversation are made from.
OF_THE_PROMPT = ("hard_prompt", "opening_messages", "chat_template_kwargs", "question_prefix", "text", "token_ids")


class NamedPrefixes:
    """The prefixes of a policy: its own, `default`, those loaded beside it, and the frozen hard prompt.

    Attributes:
        model: the PEFT model that holds them.
        active: the name of the soft prefix that answers.
        prefix: what that one stood for at the start, and what it has seen.
    """

    def __init__(self, model: PeftModel, prefix: ChatPrefix):
        self.model = model
        self.active = SOFT
        self.prefix = prefix
        self._prefixes = {SOFT: prefix}
        self._strengths: dict[str, tuple[torch.Tensor, float]] = {}  # by name: the prefix at 1, and what it is at

    def add_hard_prompt(self) -> None:
        """Add the hard prompt as a second, frozen prefix, if it is not there yet."""
        if HARD not in self.model.peft_config:
            add_hard_prompt(self.model, self.prefix.token_ids)

    @contextmanager
    def hard_prompt_active(self) -> Iterator[None]:
        """Inside, the model answers as the hard prompt."""
        self.add_hard_prompt()
        with hard_prompt_active(self.model):
            yield

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Make the active prefix hard + strength x (soft - hard): bit for bit the hard prompt at 0, itself at 1.

        "Soft" is what was last trained or loaded, whatever the strength was before. Training and `save_pretrained` take
        the prefix as it is then: one that is trained at 0.5 is the new soft, at strength 1, and so is one that is saved
        at 0.5 once it is loaded again.

        Args:
            strength: 0 to 1.5; beyond 1 it goes on in the direction of training.

        Raises:
            InputError: it is no such number, or the prefix is sharded over processes.
        """
        check_strength(strength)
        self._check_whole()
        self.add_hard_prompt()
        hard, prefix = hard_prefix(self.model), soft_prefix(self.model, self.active)
        soft, last = self._strengths.get(self.active, (prefix.clone(), 1.0))
        soft = soft.to(prefix)  # the model may have been moved since then
        # Trained or loaded since then? (Not compared to the last bit: another device rounds otherwise.)
        if not torch.allclose(prefix, torch.lerp(hard, soft, last), rtol=1e-6, atol=1e-7):
            soft = prefix.clone()
        prefix.copy_(torch.lerp(hard, soft, strength))  # lerp is exact at both ends
        self._strengths[self.active] = soft, float(strength)

    def load_adapter(
        self, folder_or_hub_id: str | Path, name: str, *, revision: str | None = None, **download: Any
    ) -> None:
        """Load another prefix of the same hard prompt beside this one, frozen; `set_adapter` makes it answer.

        Args:
            folder_or_hub_id: an adapter as `from_pretrained` takes it.
            name: what to call it here.
            revision: of the adapter on the Hub.
            **download: `token` and `cache_dir`, as transformers has them.

        Raises:
            InputError: it is no policy adapter, or one of another hard prompt or base model; the name is taken or
                cannot be one; or this policy's prefix is sharded over processes.
        """
        self._check_whole()
        self.add_hard_prompt()  # its name is taken too
        if not isinstance(name, str) or hasattr(self.model.prompt_encoder, name) or "." in name:
            raise InputError(f"a prefix cannot be called {name!r} here: the name is taken, or PEFT cannot have it")
        if name in f"{PeftType.PREFIX_TUNING.value.lower()}_":
            raise InputError(
                f"a prefix cannot be called {name!r}: PEFT mistakes a part of 'prefix_tuning_' for its own"
            )
        opened = open_adapter(folder_or_hub_id, revision, **download)
        self._check_belongs_here(opened, str(folder_or_hub_id))
        add_prefix(self.model, name)
        self._prefixes[name] = load_prefix(self.model, str(opened.adapter), opened.prefix, name)

    def set_adapter(self, name: str) -> None:
        """Answer with another prefix: one that `load_adapter` has loaded, or `default`, the policy's own.

        Raises:
            InputError: there is none of this name, or the hard prompt is active.
        """
        if name not in self._prefixes:
            raise InputError(f"no prefix is called {name!r} here: there are {', '.join(self._prefixes)}")
        if self.model.active_adapter == HARD:
            raise InputError("set_adapter has no effect within hard_prompt_active(): call it outside")
        self._prefixes[self.active] = self.prefix
        self.model.set_adapter(name)
        self.active, self.prefix = name, self._prefixes[name]

    def check_own_is_active(self, what: str) -> None:
        """Check that the active prefix is the policy's own, which alone is trained and saved.

        Raises:
            InputError: another one is.
        """
        if self.active != SOFT:
            raise InputError(
                f"{self.active!r} is active, and {SOFT!r} alone can be {what}: set_adapter({SOFT!r}) first, or load "
                "the other one by from_pretrained"
            )

    def _check_whole(self) -> None:
        if isinstance(soft_prefix(self.model), DTensor):
            raise InputError("the prefix is sharded over processes: save it, and load the adapter in one that is not")

    def _check_belongs_here(self, opened: OpenedPolicy, name: str) -> None:
        other = [field for field in OF_THE_PROMPT if getattr(opened.prefix, field) != getattr(self.prefix, field)]
        if other:
            raise InputError(
                f"{name} is not of this policy's hard prompt, and the chat template here would be wrong for it: "
                f"{', '.join(other)} in h2s.json differ; load it by from_pretrained"
            )
        config = self.model.peft_config[SOFT]
        (ours, commit), (theirs, other_commit) = (
            _base(config.base_model_name_or_path, config.revision),
            _base(opened.source, opened.revision),
        )
        if ours != theirs or (None not in (commit, other_commit) and commit != other_commit):
            raise InputError(
                f"{name} was made for another base model: expected {ours} (revision {commit}), got {theirs} (revision "
                f"{other_commit})"
            )
        ours_in, theirs_in = self.prefix.quantization, opened.prefix.quantization
        if ours_in != theirs_in:
            raise InputError(
                f"{name} was made for its base in another quantization: expected {ours_in}, got {theirs_in}"
            )


def _base(source: str, revision: str | None) -> tuple[str, str | None]:
    """A base model's name on the Hub, or else its folder, and its revision; the Hub's own cache tells both."""
    name, commit = hub_name(source) or (source, None)
    return name, commit or revision
