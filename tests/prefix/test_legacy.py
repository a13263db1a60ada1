"""The prototype's `.pth`: read as data alone, and equal to the prototype's own forward, which stands here again.

That forward is written from its description: token embeddings looked up in the table and scaled as Gemma's paper does,
the trained ones between the template's two ends, everything in one pass without a cache.
"""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from tiny import HARD_PROMPT, WINDOW, build_tokenizer, save_gemma, turns
from transformers import AutoModelForCausalLM, AutoTokenizer

from h2s import InputError, PrefixTuningPolicyModel
from h2s.prefix.adapter import HARD, fingerprint, soft_prefix
from h2s.prefix.legacy import LegacyCheckpoint
from h2s.prefix.opened import open_legacy

BEFORE, AFTER = "<bos><start_of_turn>user\n", "\n\nstart<end_of_turn>\n<start_of_turn>model\n"
CONVERSATION = [
    {"role": "assistant", "content": "How was your day?"},
    {"role": "user", "content": "Good walk."},
    {"role": "assistant", "content": "and you?"},
    {"role": "user", "content": "I like tea and long books."},
]
RENDERED = (
    "好的，題目如下：How was your day?<end_of_turn>\n<start_of_turn>user\nGood walk.<end_of_turn>\n"
    "<start_of_turn>model\nand you?<end_of_turn>\n<start_of_turn>user\nI like tea and long books.<end_of_turn>\n"
    "<start_of_turn>model\n"
)
LONG_PROMPT = f"{HARD_PROMPT} {HARD_PROMPT}"


@pytest.fixture(scope="module")
def stock(gemma_folder):
    model = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(gemma_folder)


def ids_of(stock, text):
    return stock[1](text, add_special_tokens=False).input_ids


def embedded(stock, ids):
    """Rows of the table times sqrt(hidden)."""
    table = stock[0].state_dict()["model.embed_tokens.weight"]
    return table[ids] * math.sqrt(table.shape[1])


@torch.no_grad()
def prototype_logits(stock, embeddings, rest):
    """What the prototype's model makes of the tokens of `rest`, shape (T, V)."""
    whole = [embedded(stock, ids_of(stock, BEFORE)), embeddings, embedded(stock, ids_of(stock, AFTER) + rest)]
    logits = stock[0](inputs_embeds=torch.cat(whole)[None], use_cache=False).logits[0]
    return logits[-len(rest) :]


def checkpoint(stock, file, trained=0.3, hard_prompt=HARD_PROMPT, **changed):
    """A `.pth` as the prototype leaves one; `trained` is how far its embeddings have moved, in their own spread."""
    ids = ids_of(stock, hard_prompt)
    embeddings = embedded(stock, ids)
    torch.manual_seed(3)
    embeddings = embeddings + trained * embeddings.std() * torch.randn(embeddings.shape)
    content = {
        "epoch_idx": 4,
        "diff_reward": 0.25,
        "prefix_embeddings_state_dict": embeddings,
        "prefix_ids": torch.tensor([ids]),
        "value_head_state_dict": {"net.0.weight": torch.zeros(32, 32), "net.2.bias": torch.zeros(1)},
    } | changed
    torch.save({k: v for k, v in content.items() if v is not ...}, file)
    return embeddings


def converted(gemma_folder, file):
    return PrefixTuningPolicyModel.load(open_legacy(str(gemma_folder), file), dtype="float32")


@torch.no_grad()
def logits_of(policy, rest):
    return policy.model(torch.tensor([rest])).logits[0]


def largest(difference, reference):
    return (difference.abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("hard_prompt", [HARD_PROMPT, LONG_PROMPT, "你好，今天天氣如何？ I like tea."])
def test_equals_the_prototypes_own_forward(stock, gemma_folder, tmp_path, hard_prompt):
    embeddings = checkpoint(stock, tmp_path / "old.pth", hard_prompt=hard_prompt)
    policy = converted(gemma_folder, tmp_path / "old.pth")
    (rest,) = policy.encode([CONVERSATION], 1)
    assert rest == ids_of(stock, RENDERED)
    expected = prototype_logits(stock, embeddings, rest)
    assert largest(logits_of(policy, rest) - expected, expected) < 1e-4
    # The reference, and what the soft prefix is not: the hard prompt as text.
    hard_ids = ids_of(stock, BEFORE + hard_prompt + AFTER)
    with torch.no_grad():
        hard = stock[0](torch.tensor([hard_ids + rest])).logits[0, len(hard_ids) :]
    with policy.hard_prompt_active():
        assert largest(logits_of(policy, rest) - hard, hard) < 1e-4
    assert largest(expected - hard, hard) > 1e-2
    soft, reference = (policy.model.prompt_encoder[name].embedding.weight for name in ("default", HARD))
    assert soft.shape == reference.shape and len(soft) == len(hard_ids) == len(policy.prefix.token_ids)
    assert policy.prefix.hard_prompt == hard_prompt and policy.prefix.first_role == "assistant"


def test_prompts_here_are_longer_than_the_window(stock):
    assert len(ids_of(stock, LONG_PROMPT)) > WINDOW / 2 and len(ids_of(stock, BEFORE + LONG_PROMPT + AFTER)) > WINDOW


def test_embeddings_that_nothing_has_trained_are_the_hard_prompt(stock, gemma_folder, tmp_path):
    """So it is what Gemma's embedding module gives that the prototype trained: rows of its table would be another."""
    checkpoint(stock, tmp_path / "untrained.pth", trained=0)
    policy = converted(gemma_folder, tmp_path / "untrained.pth")
    assert policy.difference_to_hard_prompt() < 1e-5
    rows = embedded(stock, ids_of(stock, HARD_PROMPT)) / math.sqrt(32)
    checkpoint(stock, tmp_path / "rows.pth", prefix_embeddings_state_dict=rows)
    assert converted(gemma_folder, tmp_path / "rows.pth").difference_to_hard_prompt() > 1e-2


def test_it_measures_itself(stock, gemma_folder, tmp_path):
    checkpoint(stock, tmp_path / "old.pth")
    opened = open_legacy(str(gemma_folder), tmp_path / "old.pth")
    policy = PrefixTuningPolicyModel.load(opened, dtype="float32")
    assert policy.difference_to_legacy(opened.legacy) < 1e-4 < policy.difference_to_hard_prompt()
    with torch.no_grad():
        soft_prefix(policy.model)[3] += 1
    assert policy.difference_to_legacy(opened.legacy) > 1e-4


def test_saved_and_loaded_it_stays_the_trained_one(stock, gemma_folder, tmp_path):
    """An untrained adapter is converted anew when it loads; this one must not become its hard prompt."""
    checkpoint(stock, tmp_path / "old.pth")
    policy = converted(gemma_folder, tmp_path / "old.pth")
    policy.save_pretrained(tmp_path / "adapter")
    again = PrefixTuningPolicyModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert fingerprint(again.model) == fingerprint(policy.model)
    assert again.difference_to_hard_prompt() == policy.difference_to_hard_prompt() > 1e-2
    content = json.loads((tmp_path / "adapter" / "h2s.json").read_text(encoding="utf-8"))
    assert content["hard_prompt"] == HARD_PROMPT and content["question_prefix"] == "好的，題目如下："
    assert content["seen"] == ["unknown"] and content["start"] is None
    answered = again.generate_response("How was your day?", turns("user"), temperature=0, max_completion_length=4)
    assert answered[:-1] == turns("user") and answered[-1]["role"] == "assistant"


def test_of_another_dtype(stock, gemma_folder, tmp_path):
    embeddings = checkpoint(stock, tmp_path / "old.pth")
    half = torch.nn.Parameter(embeddings.bfloat16())
    checkpoint(stock, tmp_path / "half.pth", prefix_embeddings_state_dict=half)
    read = LegacyCheckpoint.read(tmp_path / "half.pth")
    assert read.embeddings.dtype == torch.float32 and not read.embeddings.requires_grad
    assert torch.equal(read.embeddings, embeddings.bfloat16().float())


# What is refused before a model loads


class Trapped:
    """Unpickled it makes a file."""

    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return open, (str(self.trap), "w")


def written(content):
    return lambda stock, file: file.write_bytes(content)


def saved(**changed):
    return lambda stock, file: checkpoint(stock, file, **changed)


def cut_off(stock, file):
    checkpoint(stock, file)
    file.write_bytes(file.read_bytes()[:-2000])


HALF_A_CHARACTER = build_tokenizer().convert_tokens_to_ids("ä")  # the byte 0xE4, with which 你 begins
NAN = torch.full((3, 32), math.nan)
UNREADABLE = "cannot be read: it is no checkpoint of torch's, or not whole .* copy it again"
PROGRAM = (
    "it holds a .*open, which might run code: where you trust the file, torch.save a dict of its prefix_emb.* alone"
)
REFUSED = {
    "no file": (lambda stock, file: None, "cannot be read: there is no such file"),
    "a folder": (lambda stock, file: file.mkdir(), UNREADABLE),
    "empty": (written(b""), UNREADABLE),
    "text": (written(b"epoch_idx: 4\n"), UNREADABLE),
    "cut off": (cut_off, UNREADABLE),
    "a program": (lambda stock, file: torch.save({"prefix_ids": Trapped(file.parent / "trap")}, file), PROGRAM),
    "a number of numpy's": (saved(diff_reward=np.float64(0.25)), "holds a numpy.*scalar, which might run code"),
    "a bare pickle": (lambda stock, file: file.write_bytes(pickle.dumps(Trapped(file.parent / "trap"))), UNREADABLE),
    "a list": (lambda stock, file: torch.save([1], file), "expected a dict with the tensor prefix_emb.*, got list"),
    "a reward model's": (
        lambda stock, file: torch.save({"model_state_dict": {}, "epoch_idx": 3}, file),
        "expected a dict with the tensor prefix_embeddings_state_dict, got model_state_dict, epoch_idx",
    ),
    "no tokens": (saved(prefix_ids=...), "expected a dict with the tensor prefix_ids, got epoch_idx, diff_reward"),
    "tokens as a list": (saved(prefix_ids=[[1, 2]]), "expected a dict with the tensor prefix_ids"),
    "a state dict": (saved(prefix_embeddings_state_dict={"weight": NAN}), "the tensor prefix_embeddings_state_dict"),
    "NaN": (saved(prefix_embeddings_state_dict=NAN), "must be finite numbers of shape"),
    "whole embeddings": (saved(prefix_embeddings_state_dict=torch.ones(3, 32).int()), "got torch.int32 of shape"),
    "of a batch": (saved(prefix_embeddings_state_dict=torch.ones(1, 3, 32)), r"got torch.float32 of shape \(1, 3, 32"),
    "of nothing": (
        saved(prefix_embeddings_state_dict=torch.ones(0, 32), prefix_ids=torch.ones(1, 0).int()),
        "at least 1, got torch.int32 of shape",
    ),
    "fewer tokens": (saved(prefix_ids=torch.tensor([[7, 8]])), r"must be whole numbers of shape \(1, n\).*\(1, 2\)"),
    "tokens of a row": (saved(prefix_ids=torch.tensor([7, 8])), r"must be whole numbers of shape \(1, n\).*\(2,\)"),
    "tokens in halves": (saved(prefix_ids=torch.full((1, 19), 7.5)), "must be whole numbers of shape"),
    "another width": (
        saved(prefix_embeddings_state_dict=torch.ones(2, 40), prefix_ids=torch.tensor([[7, 8]])),
        "embeddings of width 40, and the model's are 32 wide: name the model",
    ),
    "another vocabulary": (
        saved(prefix_embeddings_state_dict=torch.ones(2, 32), prefix_ids=torch.tensor([[7, 9999]])),
        "must lie between 0 and 319, got 7 to 9999",
    ),
    "a special token": (
        saved(prefix_embeddings_state_dict=torch.ones(2, 32), prefix_ids=torch.tensor([[2, 70]])),
        "prefix_ids hold '<bos>', and a hard prompt is text alone",
    ),
    "half a character": (
        saved(prefix_embeddings_state_dict=torch.ones(2, 32), prefix_ids=torch.tensor([[HALF_A_CHARACTER, 70]])),
        "are found there 0 times, expected once",
    ),
    "a word of the template": (saved(hard_prompt="start"), "are found there 2 times, expected once"),
    "newlines that merge": (saved(hard_prompt="Be kind.\n"), "are found there 0 times, expected once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_checkpoint(stock, gemma_folder, tmp_path, no_model, case):
    write, words = REFUSED[case]
    write(stock, tmp_path / "old.pth")
    with pytest.raises(InputError, match=words) as error:
        open_legacy(str(gemma_folder), tmp_path / "old.pth")
    assert "\n" not in str(error.value) and "old.pth" in str(error.value)
    assert not (tmp_path / "trap").exists()


def test_tokens_that_another_spelling_of_the_same_text_gives(stock, gemma_folder, tmp_path):
    """Letter by letter they decode to the prompt, and encoded it is other tokens."""
    letters = [i for c in HARD_PROMPT for i in ids_of(stock, c)]
    assert stock[1].decode(letters) == HARD_PROMPT and letters != ids_of(stock, HARD_PROMPT)
    embeddings = embedded(stock, letters)
    checkpoint(stock, tmp_path / "old.pth", prefix_ids=torch.tensor([letters]), prefix_embeddings_state_dict=embeddings)
    with pytest.raises(InputError, match="are found there 0 times, expected once"):
        open_legacy(str(gemma_folder), tmp_path / "old.pth")


def test_a_model_without_room(stock, tmp_path):
    checkpoint(stock, tmp_path / "old.pth")
    with pytest.raises(InputError, match="leaves the model no room for a reply"):
        open_legacy(str(save_gemma(tmp_path / "small", positions=40)), tmp_path / "old.pth")
