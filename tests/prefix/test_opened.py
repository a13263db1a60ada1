"""A policy before its weights load. In every test no model loads."""

import json
import shutil

import pytest
from tiny import HARD_PROMPT, sample_context, turns
from transformers import AutoTokenizer

from h2s import InputError, PrefixTuningPolicyModel
from h2s.prefix.opened import open_hard_prompt, open_policy
from h2s.prefix.prompts import encode_prompts
from h2s.run.arguments import PolicyModelArguments

POSITIONS, PREFIX = 1024, 31


@pytest.fixture(autouse=True)
def nothing_loads(policy_adapter, no_model):
    """The session's adapter is made before."""


@pytest.fixture(params=["hard prompt", "adapter"])
def opened(request, gemma_folder, policy_adapter):
    if request.param == "adapter":
        return PrefixTuningPolicyModel.open(policy_adapter)
    return open_hard_prompt(str(gemma_folder), HARD_PROMPT)


def test_what_is_known_of_a_policy(opened, gemma_folder, policy_adapter):
    assert opened.source == str(gemma_folder.resolve()) and opened.revision is None
    assert opened.config.vocab_size == 320
    assert opened.prefix.hard_prompt == HARD_PROMPT and len(opened.prefix.token_ids) == PREFIX
    assert opened.adapter in (None, str(policy_adapter))
    assert opened.prefix.seen == [] and opened.download == {}


def test_encode_gives_what_follows_the_prefix(opened, gemma_folder):
    stock = AutoTokenizer.from_pretrained(gemma_folder)
    contexts = [sample_context(i) for i in range(6)]
    for context, ids in zip(contexts, opened.encode(contexts, 1), strict=True):
        messages = [{"role": "system", "content": HARD_PROMPT}, *context]
        whole = stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert opened.prefix.token_ids + ids == whole


def test_encode_leaves_room_for_the_completion(opened):
    context = sample_context(2)
    (ids,) = encode_prompts(opened.tokenizer, opened.prefix, [context])
    room = POSITIONS - PREFIX - len(ids)
    assert opened.encode([context], room) == [ids]
    with pytest.raises(InputError, match=rf"context 1 is {len(ids)} tokens long, but the model takes {len(ids) - 1} "):
        opened.encode([context], room + 1)


def test_encode_names_the_context_by_its_number(opened):
    good = sample_context(1)
    for bad, words in (
        (turns("assistant", "user"), "2 of 4 contexts begin with the assistant, .* mend context 3, context 4"),
        ([{"role": "user", "content": "a <bos>"}], "context 3: a message of the user spells out '<bos>'"),
    ):
        with pytest.raises(InputError, match=words):
            opened.encode([good, good, bad, bad], 1)


def test_hard_prompt_that_leaves_no_room(gemma_folder, tmp_path):
    """One position is room, none is not."""
    base = shutil.copytree(gemma_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))

    def open_with(positions):
        (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        return open_hard_prompt(str(base), HARD_PROMPT)

    assert open_with(PREFIX + 1).config.max_position_embeddings == PREFIX + 1
    with pytest.raises(InputError, match=f"the hard prompt is {PREFIX} tokens long and leaves the model no room"):
        open_with(PREFIX)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("h2s.json", "is not a policy adapter made by h2s: it holds no h2s.json"),
        ("adapter_config.json", "is not a policy adapter made by h2s: there is no adapter_config.json in it"),
        ("adapter_model.safetensors", "there is no adapter_model.safetensors in it"),
        ("tokenizer.json", "no tokenizer can be loaded from"),
    ],
)
def test_adapter_that_lacks_a_file(policy_adapter, tmp_path, missing, words):
    adapter = shutil.copytree(policy_adapter, tmp_path / "adapter")
    (adapter / missing).unlink()
    with pytest.raises(InputError, match=words):
        PrefixTuningPolicyModel.open(adapter)


# What a recipe names


def test_a_prefix_adapter_or_a_hard_prompt(gemma_folder, policy_adapter):
    named = PolicyModelArguments(
        model_name_or_path=str(gemma_folder), hard_prompt="Be brief.", opening_user_message="start"
    )
    opened = open_policy(named)
    assert opened.adapter is None and opened.prefix.hard_prompt == "Be brief."
    assert opened.prefix.first_role == "assistant"
    assert open_policy(PolicyModelArguments(), str(policy_adapter)).adapter == str(policy_adapter)


@pytest.mark.parametrize(
    "named",
    [
        {"model_name_or_path": "me/model"},
        {"hard_prompt": "Be brief."},
        {"hard_prompt_file": "prompt.txt"},
        {"opening_user_message": "start"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=str,
)
def test_a_prefix_adapter_brings_its_own(policy_adapter, named):
    (key,) = named
    with pytest.raises(InputError, match=f"prefix_adapter brings its own {key}: leave {key} out"):
        open_policy(PolicyModelArguments(**named), str(policy_adapter))


def test_nothing_is_named():
    with pytest.raises(InputError, match="model_name_or_path is missing"):
        open_policy(PolicyModelArguments())
