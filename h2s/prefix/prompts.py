"""Conversations as the tokens that follow a prefix: how they must begin, the seam, and how long they may be."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from h2s.data.datasets import places_of
from h2s.data.messages import Messages, as_messages
from h2s.errors import InputError
from h2s.models import room_for_text
from h2s.prefix.chat_template import ChatPrefix, check_plain_text, render, special_tokens


def encode_beside(
    tokenizer: PreTrainedTokenizerBase,
    prefix: ChatPrefix,
    config: PretrainedConfig,
    contexts: Dataset | Sequence[Messages],
    max_completion_length: int,
) -> list[list[int]]:
    """Encode contexts that leave room for a completion beside prefix and prompt."""
    room = room_for_text(config, len(prefix.token_ids)) - max_completion_length
    if not isinstance(contexts, Dataset):
        return encode_prompts(tokenizer, prefix, contexts, room)
    messages = [as_messages(prompt) for prompt in contexts["prompt"]]
    return encode_prompts(tokenizer, prefix, messages, room, places_of(contexts))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prefix: ChatPrefix,
    contexts: Sequence[Messages],
    max_length: int | None = None,
    places: Sequence[str] | None = None,
) -> list[list[int]]:
    """What must be fed after the prefix for the model to reply to each context.

    Args:
        tokenizer: the adapter's, with the wrapped template.
        prefix: what the adapter holds.
        contexts: conversations that wait for the assistant's reply.
        max_length: the most tokens a prompt may have (the policy never cuts).
        places: what errors call each context; `context 1` and so on by default.

    Returns:
        Token ids a context.

    Raises:
        InputError: a context begins with the wrong role, spells out a special token, its tokens merge with the
            prefix's, or it is too long; the context is named by its place.
    """
    special = special_tokens(tokenizer)
    places = places or [f"context {number}" for number in range(1, len(contexts) + 1)]
    _check_beginnings(prefix, contexts, places)
    prompts = []
    for place, messages in zip(places, contexts, strict=True):
        for message in messages:
            check_plain_text(f"{place}: a message of the {message['role']}", message["content"], special)
        try:
            prompts.append(render(tokenizer, messages, add_generation_prompt=True))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    encoded = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    first = prefix.token_ids
    for place, text, ids in zip(places, prompts, encoded, strict=True):
        # tokens(prefix) + tokens(rest) must be tokens(whole), or the model would see others than the hard prompt's.
        whole = tokenizer(prefix.text + text, add_special_tokens=False).input_ids
        if whole != first + ids:
            at = next((i for i, (a, b) in enumerate(zip(whole, first + ids, strict=False)) if a != b), len(first))
            merged = tokenizer.convert_ids_to_tokens(whole[at : at + 1])
            raise InputError(
                f"{place} merges with the hard prompt across the seam (token {merged}): it begins with "
                f"{text[:20]!r} after {prefix.text[-20:]!r}; change how the context begins"
            )
        if max_length is not None and len(ids) > max_length:
            raise InputError(
                f"{place} is {len(ids)} tokens long, but the model takes {max_length} beside the prefix and "
                "the completion: shorten it or lower max_completion_length (or eval_max_completion_length)"
            )
    return encoded


def _check_beginnings(prefix: ChatPrefix, contexts: Sequence[Messages], places: Sequence[str]) -> None:
    """Check that all begin with the role that the prefix leaves to them.

    Raises:
        InputError: some do not; where others do, these are the odd ones.
    """
    odd = [place for place, messages in zip(places, contexts, strict=True) if messages[0]["role"] != prefix.first_role]
    if not odd:
        return
    role = "assistant" if prefix.first_role == "user" else "user"
    if len(odd) < len(contexts):
        more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
        raise InputError(
            f"{len(odd)} of {len(contexts)} contexts begin with the {role}, the others with the {prefix.first_role}, "
            f"as they must with this prompt: leave out or mend {', '.join(odd[:10])}{more}"
        )
    raise InputError(
        f"{odd[0]} begins with the {role}, but with this prompt a conversation begins with the {prefix.first_role}: "
        f"begin it so, or make the adapter {'with' if role == 'assistant' else 'without'} an opening_user_message"
    )
