import copy
import itertools
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, TaskType
from safetensors.torch import load_file
from tiny import build_reward_model, sample_context
from transformers import AutoTokenizer

from h2s.data.messages import conversation_id
from h2s.errors import InputError
from h2s.models import load_config, load_tokenizer
from h2s.prefix.adapter import soft_prefix
from h2s.reward.model import (
    PreferenceCollator,
    RewardModel,
    add_reward_prefix,
    check_encoder,
    context_text,
    encode_pair,
    load_encoder,
    max_text_tokens,
    open_encoder,
    readable_pairs,
    reply_text,
    tokenize_preferences,
)

VIRTUAL = 4
LIMIT = 64


@pytest.fixture
def bert_tokenizer(bert_folder):
    return load_tokenizer(str(bert_folder))


@pytest.fixture
def loud(loud_bert):
    """A reward model of large weights, those of its head drawn with a seed."""
    reward = build_reward_model(loud_bert, VIRTUAL, 128 - VIRTUAL)
    for name, parameter in reward.model.named_parameters():
        if "modules_to_save" in name and name.endswith("weight"):
            parameter.data.normal_()
    return reward


def tokens(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"])


CONTEXTS = [sample_context(i) for i in range(9)]
RESPONSES = [
    "how was the walk?",
    "i like tea.",
    "a",
    "song " * 30,
    "?",
    "I ran and ran.",
    "rain",
    "cat film",
    "trip. " * 7,
]


# What BERT reads


def test_texts_of_what_is_scored():
    """Text stays; of messages it is their contents; TRL's completion is a list of one."""
    assert context_text(sample_context(0)) == "walk number 0\nwhat did you do?\nI ran."
    assert context_text("walk\ntea") == "walk\ntea"
    assert reply_text("tea") == reply_text([{"role": "assistant", "content": "tea"}]) == "tea"


def test_layout_of_a_pair(bert_tokenizer):
    """Every word here is one token of the vocabulary."""
    encoded = encode_pair(bert_tokenizer, "walk tea", "book rain work", max_tokens=20)
    assert tokens(bert_tokenizer, encoded) == ["[CLS]", "walk", "tea", "[SEP]", "book", "rain", "work", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("room", [0, 1, 400])
def test_layout_is_berts_own(bert_tokenizer, room):
    """All that the tokenizer makes of a pair by itself, as long as nothing has to be cut."""
    for context, response in zip(["", *map(context_text, CONTEXTS)], ["tea", *RESPONSES], strict=True):
        own, counted = bert_tokenizer(context, response), Counter()
        encoded = encode_pair(bert_tokenizer, context, response, len(own.input_ids) + room, counted)
        assert dict(encoded) == dict(own) and not +counted


@pytest.mark.parametrize(
    ("max_tokens", "context", "response", "cuts"),
    [
        (8, "walk tea", "book rain work", {}),
        # One too long: the context loses its beginning.
        (7, "tea", "book rain work", {"context": 1}),
        # The context is gone, the response still whole.
        (6, "", "book rain work", {"context": 1}),
        # Only then the response loses its end.
        (5, "", "book rain", {"context": 1, "response": 1}),
    ],
)
def test_cut_rules(bert_tokenizer, max_tokens, context, response, cuts):
    counted = Counter()
    encoded = encode_pair(bert_tokenizer, "walk tea", "book rain work", max_tokens, counted)
    assert tokens(bert_tokenizer, encoded) == ["[CLS]", *context.split(), "[SEP]", *response.split(), "[SEP]"]
    assert len(encoded["input_ids"]) == len(encoded["token_type_ids"]) == max_tokens
    assert +counted == Counter(cuts)


@pytest.mark.parametrize("max_tokens", [5, 9, 17, 40])
def test_cut_pair_is_what_the_tokenizer_itself_cuts(bert_tokenizer, max_tokens):
    """By its own truncation: the context's beginning, or with nothing of the context the response's end."""
    room = max_tokens - 3
    for context, response in itertools.product(map(context_text, CONTEXTS), RESPONSES):
        tail = len(bert_tokenizer(response, add_special_tokens=False).input_ids)
        encoded = encode_pair(bert_tokenizer, context, response, max_tokens)
        own = copy.deepcopy(bert_tokenizer)
        own.truncation_side = "left" if tail < room else "right"
        pair, strategy = ((context, response), "only_first") if tail < room else (("", response), "only_second")
        assert dict(encoded) == dict(own(*pair, truncation=strategy, max_length=max_tokens))


def test_empty_context_is_not_counted_as_cut(bert_tokenizer):
    counted = Counter()
    encode_pair(bert_tokenizer, "", "book rain work", 5, counted)
    assert +counted == Counter({"response": 1})


def test_special_tokens_in_a_text_stay_text(bert_tokenizer):
    encoded = encode_pair(bert_tokenizer, "[SEP] walk", "[CLS] [SEP]", 50)
    special = {bert_tokenizer.sep_token_id, bert_tokenizer.cls_token_id}
    ids = encoded["input_ids"]
    assert [i for i, token in enumerate(ids) if token in special] == [
        0,
        encoded["token_type_ids"].index(1) - 1,
        len(ids) - 1,
    ]
    assert ids.count(bert_tokenizer.sep_token_id) == 2 and ids.count(bert_tokenizer.cls_token_id) == 1


def test_room_beside_the_prefix(bert_folder, bert_tokenizer):
    config = load_config(str(bert_folder))  # 128 positions
    for limit in (None, 108):
        assert max_text_tokens(config, bert_tokenizer, 20, limit) == 108
        source, tokenizer, room = open_encoder(str(bert_folder), 20, limit)
        assert (source, tokenizer.get_vocab(), room) == (str(bert_folder), bert_tokenizer.get_vocab(), 108)
    for limit in (109, 4, 0):
        for call in (
            lambda limit=limit: max_text_tokens(config, bert_tokenizer, 20, limit),
            lambda limit=limit: open_encoder(str(bert_folder), 20, limit),
        ):
            with pytest.raises(InputError, match=rf"max_tokens must lie between 5 and 108 .*got {limit}$"):
                call()


def test_full_length_text_runs(loud):
    """The positions of prefix and text together are just enough."""
    score = loud.score(["walk " * 300], ["tea " * 20])
    assert score.isfinite().all() and loud.cuts == {"context": 1, "response": 0}


def test_reward_model_must_be_a_bert(gemma_folder, bert_folder):
    check_encoder(load_config(str(bert_folder)), load_tokenizer(str(bert_folder)), "it")
    with pytest.raises(InputError, match="it is a gemma3_text model: the reward model must be a BERT"):
        check_encoder(load_config(str(gemma_folder)), load_tokenizer(str(gemma_folder)), "it")
    with pytest.raises(InputError, match="tiny-gemma is a gemma3_text model"):
        open_encoder(str(gemma_folder), 4)
    with pytest.raises(InputError, match="no sequence classification model can be loaded from no/such"):
        load_encoder("no/such")


# Scores


@torch.no_grad()
def score_alone(reward, context, response):
    """One pair, unpadded, through PEFT's own forward, encoded by the tokenizer itself."""
    text = "\n".join(message["content"] for message in context)
    return reward.model(**reward.tokenizer(text, response, return_tensors="pt")).logits.item()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_scores_equal_unpadded_ones_in_order(loud, batch_size):
    """In whatever form contexts and replies come, and as a reward of TRL's."""
    loud.batch_size = batch_size
    expected = [score_alone(loud, c, r) for c, r in zip(CONTEXTS, RESPONSES, strict=True)]
    assert max(expected) - min(expected) > 0.05 and len({round(e, 4) for e in expected}) == len(expected)
    scores = loud.score(CONTEXTS, RESPONSES)
    assert scores.shape == (9,) and scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    backwards = loud.score(CONTEXTS[::-1], RESPONSES[::-1])
    assert backwards.tolist() == pytest.approx(expected[::-1], abs=1e-5)
    completions = [[{"role": "assistant", "content": r}] for r in RESPONSES]
    contexts = [context_text(c) for c in CONTEXTS]
    for forms in ((CONTEXTS, completions), (contexts, RESPONSES), ([*contexts[:4], *CONTEXTS[4:]], completions)):
        assert torch.equal(loud.score(*forms), scores)
    as_trl_calls = loud(
        prompts=CONTEXTS, completions=completions, completion_ids=[[7]] * 9, level=[1] * 9, trainer_state=None
    )
    assert isinstance(as_trl_calls, list) and as_trl_calls == scores.tolist()
    assert not +loud.cuts and not scores.requires_grad


def test_a_reply_a_context(loud):
    with pytest.raises(ValueError, match="shorter"):
        loud.score(CONTEXTS, RESPONSES[:-1])


def test_prefix_and_types_matter(loud):
    """The comparisons here can fail."""
    before = score_alone(loud, CONTEXTS[0], RESPONSES[0])
    swapped = score_alone(loud, [{"content": RESPONSES[0]}], context_text(CONTEXTS[0]))
    with torch.no_grad():
        soft_prefix(loud.model).neg_()
    after = score_alone(loud, CONTEXTS[0], RESPONSES[0])
    assert abs(after - before) > 1e-3 and abs(swapped - before) > 1e-3


PLAIN = """
import json, sys
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder, pairs = json.load(sys.stdin)
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    scores = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
assert "h2s" not in sys.modules
json.dump(scores, sys.stdout)
"""


def test_plain_peft_scores_the_same(loud, tmp_path):
    """Saved after a text was cut, which must not stick to the tokenizer."""
    loud.max_tokens = LIMIT
    loud.score(["walk " * 200], ["tea"])
    loud.save_pretrained(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(tmp_path / "reward")
    assert (loaded.max_tokens, loaded.__name__) == (LIMIT, "reward")
    short = [0, 1, 2, 4]
    scores = loaded.score([CONTEXTS[i] for i in short], [RESPONSES[i] for i in short]).tolist()
    assert scores == pytest.approx([score_alone(loud, CONTEXTS[i], RESPONSES[i]) for i in short], abs=1e-5)
    pairs = [(context_text(CONTEXTS[i]), RESPONSES[i]) for i in short]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps([str(tmp_path / "reward"), pairs]),
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(scores, abs=1e-5)


def test_saved_tokenizer_is_the_encoders(loud, bert_tokenizer, tmp_path):
    """Whatever was scored before: the files of a model are the same each time."""
    saved = {}
    for number, (context, reply) in enumerate([("walk", "tea"), ("walk " * 200, "tea"), ("walk", "tea " * 200)]):
        loud.score([context], [reply])
        loud.save_pretrained(tmp_path / str(number))
        names = ("tokenizer.json", "tokenizer_config.json")
        saved[number] = [(tmp_path / str(number) / name).read_text(encoding="utf-8") for name in names]
    assert saved[0] == saved[1] == saved[2]
    plain = AutoTokenizer.from_pretrained(tmp_path / "2")
    assert plain.truncation_side == bert_tokenizer.truncation_side == "right"
    long = "walk " * 50, "tea " * 50
    assert plain(*long).input_ids == bert_tokenizer(*long).input_ids


def test_saved_adapter_holds_all_that_is_trained(loud, tmp_path):
    loud.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["prompt_embeddings"], soft_prefix(loud.model))
    modules = {name.removeprefix("base_model.") for name in saved} - {"prompt_embeddings"}
    trained = {"bert.pooler.dense", "classifier", "bert.encoder.layer.1.attention.self.query"}
    assert modules == {f"{module}.{part}" for module in trained for part in ("weight", "bias")}


def test_card_has_no_path_of_this_machine(loud, loud_bert, tmp_path):
    """It goes to the Hub; what it names is the folder's last part."""
    loud.save_pretrained(tmp_path / "kind-reward", "Accuracy 0.9.")
    card = (tmp_path / "kind-reward" / "README.md").read_text(encoding="utf-8")
    for path in (str(tmp_path), loud_bert, loud_bert.rsplit("/", 1)[0]):
        assert path not in card
    assert "loud-bert" in card and "Accuracy 0.9." in card
    assert card.count('.from_pretrained("kind-reward"') == 2 and "num_labels=1" in card


@pytest.mark.parametrize("content", ["{}", None])
def test_adapter_without_a_limit_takes_what_fits(loud, content, tmp_path):
    loud.max_tokens = LIMIT
    loud.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "h2s.json").unlink()
    else:
        (tmp_path / "h2s.json").write_text(content)
    loaded = RewardModel.from_pretrained(tmp_path)
    assert (loaded.max_tokens, loaded.seen) == (128 - VIRTUAL, ["unknown"])  # nor does it say what trained it


def test_what_it_has_seen_is_saved_with_it(loud, tmp_path):
    loud.seen = ["a" * 16, "b" * 16]
    loud.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))["seen"] == loud.seen
    assert RewardModel.from_pretrained(tmp_path).seen == loud.seen


@pytest.mark.parametrize(
    "content", ["{", "[1]", "[" * 9999, '{"seen": "abc"}', '{"seen": [1]}', '{"max_tokens": "9"}'], ids=lambda c: c[:9]
)
def test_h2s_json_that_is_none(loud, content, tmp_path):
    loud.save_pretrained(tmp_path)
    (tmp_path / "h2s.json").write_text(content)
    with pytest.raises(InputError, match=r"h2s.json does not describe a reward adapter"):
        RewardModel.from_pretrained(tmp_path)


def test_policy_adapter_is_no_reward_model(policy_adapter):
    with pytest.raises(InputError, match="is not a reward adapter"):
        RewardModel.from_pretrained(policy_adapter)


# The prefix on an encoder


def test_the_prefix_begins_small(bert_folder):
    """PEFT draws it from N(0, 1); a tenth of that leaves the encoder nearly as it was."""
    prefix = soft_prefix(build_reward_model(bert_folder, 100).model)
    assert prefix.std().item() == pytest.approx(0.1, rel=0.05)


def test_the_callers_configuration_is_left_as_it_was(bert_folder):
    """It makes several models: the judge's, each fold's."""
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        model = add_reward_prefix(load_encoder(str(bert_folder)), config)
        assert soft_prefix(model).shape[0] == 3
    assert config.to_dict() == before


@torch.no_grad()
def test_the_last_layer_begins_by_looking_at_all_tokens_alike(bert_folder, bert_tokenizer):
    """[CLS] of the last layer against the mean of its values over prefix and text, computed from the layer's input."""
    model = build_reward_model(bert_folder, VIRTUAL).model
    attention = model.get_base_model().bert.encoder.layer[-1].attention.self
    seen = {}
    attention.value.register_forward_hook(lambda module, inputs, output: seen.update(values=output))
    attention.register_forward_hook(lambda module, inputs, output: seen.update(mixed=output[0]))
    model(**bert_tokenizer("walk tea", "rain work", return_tensors="pt"))
    prefix = soft_prefix(model).view(VIRTUAL, -1, 2, attention.all_head_size)[:, -1, 1]  # the last layer's values
    expected = torch.cat([prefix, seen["values"][0]]).mean(0)
    torch.testing.assert_close(seen["mixed"][0, 0], expected)


# What trains it


PROMPT = [{"role": "user", "content": "walk"}]


def pairs_of(*replies):
    """Judgements of one context, as `load_preferences` gives them."""
    replies = [[[{"role": "assistant", "content": text}] for text in pair] for pair in replies]
    return Dataset.from_list([{"prompt": PROMPT, "chosen": c, "rejected": r, "label": 0} for c, r in replies])


def test_columns_of_the_tokenized_pairs(bert_tokenizer):
    cuts = Counter()
    (row,) = tokenize_preferences(pairs_of(("tea", "rain cat")), bert_tokenizer, 6, cuts)
    names = {k: bert_tokenizer.convert_ids_to_tokens(row.pop(k)) for k in ("chosen_ids", "rejected_ids")}
    assert names == {
        "chosen_ids": ["[CLS]", "walk", "[SEP]", "tea", "[SEP]"],
        "rejected_ids": ["[CLS]", "walk", "[SEP]", "rain", "cat", "[SEP]"],
    }
    assert row == {
        "chosen_type_ids": [0, 0, 0, 1, 1],
        "rejected_type_ids": [0, 0, 0, 1, 1, 1],
        "conversation": conversation_id(PROMPT),  # what a step is filled by
    }
    assert not +cuts


def test_judgements_may_be_texts(bert_tokenizer):
    """A data set of the user's own: a context that is text is one user message."""
    own = Dataset.from_list([{"prompt": "walk", "chosen": "tea", "rejected": "rain cat"}])
    rows = [tokenize_preferences(d, bert_tokenizer, 6, Counter())[0] for d in (own, pairs_of(("tea", "rain cat")))]
    assert rows[0] == rows[1]


def test_a_pairs_context_is_counted_as_cut_once(bert_tokenizer):
    """In 6 tokens: whole for both, cut for one, cut for both."""
    pairs = pairs_of(("tea", "cat"), ("tea", "rain cat tea"), ("rain cat tea", "rain tea tea book"))
    cuts = Counter()
    tokenize_preferences(pairs, bert_tokenizer, 6, cuts)
    assert cuts == {"context": 2, "response": 1}


def test_collator_encodes_each_text_once(bert_tokenizer):
    """Three pairs of three texts; one text has another's tokens and other types."""
    a = {"ids": [2, 5, 3], "type_ids": [0, 0, 1]}
    b = {"ids": [2, 6, 7, 3], "type_ids": [0, 0, 1, 1]}
    c = {"ids": [2, 5, 3], "type_ids": [0, 1, 1]}

    def pair(chosen, rejected):
        return {f"chosen_{k}": v for k, v in chosen.items()} | {f"rejected_{k}": v for k, v in rejected.items()}

    batch = PreferenceCollator(bert_tokenizer)([pair(a, b), pair(b, c), pair(a, c)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 6, 7, 3], [2, 5, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert batch["pairs"].tolist() == [[0, 1], [1, 2], [0, 2]]
    assert next(iter(batch)) == "pairs"  # what Trainer takes for the batch's size


def test_pairs_that_read_alike_are_set_aside(bert_tokenizer, caplog):
    """Beside [CLS], [SEP], [SEP] twelve tokens leave nine of a reply: the context goes first."""
    same = "tea cat rain tea cat rain tea cat rain"
    pairs = pairs_of((f"{same} walk", f"{same} tea"), ("tea", "rain"), ("tea", "TEA"), ("cat", "tea"))
    with caplog.at_level("INFO", "h2s"):
        left = readable_pairs(pairs, bert_tokenizer, 12)
    assert [row["chosen"][0]["content"] for row in left] == ["tea", "cat"]
    assert caplog.messages == [
        "2 of 4 pairs read alike to the encoder (the same responses, or cut to 12 tokens): set aside"
    ]
    assert len(readable_pairs(pairs, bert_tokenizer, 13)) == 3
    with pytest.raises(InputError, match=r"20 of 21 pairs read alike .* beyond max_tokens 12"):
        readable_pairs(pairs_of(*[(f"{same} walk", f"{same} tea")] * 20, ("tea", "cat")), bert_tokenizer, 12)


def test_unknown_tokens_are_counted(bert_tokenizer, caplog):
    assert bert_tokenizer.tokenize("walk 沒 空") == ["walk", "[UNK]", "[UNK]"]
    with caplog.at_level("INFO", "h2s"):
        readable_pairs(pairs_of(("沒", "tea"), ("tea", "沒 空 cat")), bert_tokenizer, 64)
    # Of a context and replies of one, one, one and three tokens each: 4 + 6.
    assert caplog.messages == ["the encoder reads 30.0% of the tokens as [UNK] (unknown)"]
    pairs = pairs_of(*[("沒 空 " * 6, "空 沒 " * 5)] * 5)
    with pytest.raises(InputError, match=r"reads 92% of the texts' tokens as \[UNK\].* choose another"):  # 22 of 24
        readable_pairs(pairs, bert_tokenizer, 64)
