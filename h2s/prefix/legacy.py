"""The prototype's checkpoint, a `.pth` of hardPrompt2softPrompt: trained input embeddings in place of the hard prompt.

It fed `<bos><start_of_turn>user\\n` [n embeddings] `\\n\\nstart<end_of_turn>\\n<start_of_turn>model\\n` and then the
conversation, which the assistant begins. Here that beginning goes through the frozen model once, and its KV cache is
the prefix. The tokens that the embeddings were copied from are the hard prompt, the reference.
"""

import errno
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from h2s.errors import InputError, in_short
from h2s.prefix.chat_template import special_tokens

EMBEDDINGS, TOKENS = "prefix_embeddings_state_dict", "prefix_ids"
OPENING_USER_MESSAGE = "start"
QUESTION_PREFIX = "好的，題目如下："  # "all right, the question is:", in front of every question


@dataclass(frozen=True)
class LegacyCheckpoint:
    """What a `.pth` holds of the prefix; the rest of it is left.

    Attributes:
        path: the file.
        embeddings: the soft prefix, float32, shape (n, hidden).
        token_ids: the n tokens of the hard prompt.
    """

    path: Path
    embeddings: torch.Tensor
    token_ids: list[int]

    @classmethod
    def read(cls, path: str | Path) -> "LegacyCheckpoint":
        """Read the file, as data alone.

        Raises:
            InputError: it is not such a checkpoint.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's own remarks on other programs' pickles
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever its reader trips over: of a damaged file that may be any
            raise InputError(f"legacy_checkpoint {path} cannot be read: {_reason(error)}") from error
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        for key in (EMBEDDINGS, TOKENS):
            if not isinstance(content, dict) or not isinstance(content.get(key), torch.Tensor):
                raise InputError(
                    f"legacy_checkpoint {path} is not a policy of hardPrompt2softPrompt: expected a dict with the "
                    f"tensor {key}, got {in_short(ValueError(found))}"
                )
        embeddings, ids = content[EMBEDDINGS].detach(), content[TOKENS]
        if embeddings.dim() != 2 or not embeddings.is_floating_point() or not torch.isfinite(embeddings).all():
            raise InputError(
                f"legacy_checkpoint {path}: {EMBEDDINGS} must be finite numbers of shape (n, hidden), got "
                f"{embeddings.dtype} of shape {tuple(embeddings.shape)}"
            )
        whole = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
        if not whole or tuple(ids.shape) != (1, len(embeddings)) or not len(embeddings):
            raise InputError(
                f"legacy_checkpoint {path}: {TOKENS} must be whole numbers of shape (1, n), n as many as the "
                f"{len(embeddings)} embeddings and at least 1, got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        return cls(Path(path), embeddings.float(), ids[0].tolist())

    def hard_prompt(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> str:
        """The text of its tokens.

        Raises:
            InputError: it was made for another model, or they are not text alone.
        """
        hidden, vocabulary = config.get_text_config().hidden_size, len(tokenizer)
        if self.embeddings.shape[1] != hidden:
            raise InputError(
                f"legacy_checkpoint {self.path} holds embeddings of width {self.embeddings.shape[1]}, and the model's "
                f"are {hidden} wide: name the model that it was trained on in model_name_or_path"
            )
        if not all(0 <= i < vocabulary for i in self.token_ids):
            raise InputError(
                f"legacy_checkpoint {self.path}: {TOKENS} must lie between 0 and {vocabulary - 1}, got "
                f"{min(self.token_ids)} to {max(self.token_ids)}: name the model that it was trained on"
            )
        text = tokenizer.decode(self.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        special = [token for token in special_tokens(tokenizer) if token in text]
        if special:
            raise InputError(
                f"legacy_checkpoint {self.path}: {TOKENS} hold {special[0]!r}, and a hard prompt is text alone: there "
                "is none to compare the prefix with"
            )
        return text

    def placed(self, prefix_ids: list[int]) -> "LegacyPrefix":
        """The embeddings where the hard prompt's tokens stand in the prefix.

        Raises:
            InputError: they do not stand there: decoded, rendered by the chat template and encoded they are others.
        """
        n = len(self.token_ids)
        places = [at for at in range(len(prefix_ids)) if prefix_ids[at : at + n] == self.token_ids]
        if len(places) != 1:
            raise InputError(
                f"legacy_checkpoint {self.path}: {TOKENS}, decoded to the hard prompt and encoded in the model's chat "
                f"template, are found there {len(places)} times, expected once: is it the model, with the chat "
                "template, that it was trained on? Else there is no hard prompt of as many tokens to compare with"
            )
        return LegacyPrefix(self.embeddings, places[0])


def _reason(error: BaseException) -> str:
    """Why torch does not read a file, and what to do. (Its own advice is to let the file run.)"""
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return "there is no such file"
    if named := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return (
            f"beside tensors, numbers and text it holds a {named[1]}, which might run code: where you trust the file, "
            f"torch.save a dict of its {EMBEDDINGS} and {TOKENS} alone"
        )
    return f"it is no checkpoint of torch's, or not whole ({type(error).__name__}): copy it again"


@dataclass(frozen=True)
class LegacyPrefix:
    """The embeddings, and how many tokens stand before them."""

    embeddings: torch.Tensor
    start: int

    @torch.no_grad()
    def inputs(self, base: PreTrainedModel, token_ids: list[int]) -> dict[str, Any]:
        """What the prototype fed the model in one pass, in place of tokens that begin with the prefix's.

        Its embeddings were copied from what the embedding module gives, which in Gemma is the table's rows times
        sqrt(hidden), and went into the model past that module: they are not scaled here once more.

        Returns:
            `inputs_embeds`, shape (1, T, hidden).
        """
        embeds = base.get_input_embeddings()(torch.tensor([token_ids], device=base.device))
        embeds[0, self.start : self.start + len(self.embeddings)] = self.embeddings.to(embeds)
        return {"inputs_embeds": embeds}
