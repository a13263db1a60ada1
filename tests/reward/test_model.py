import json

import pytest
import torch
from elsewhere import elsewhere
from reward.texts import CONTEXTS, RESPONSES
from safetensors.torch import load_file
from transformers import AutoTokenizer

from h2s.errors import InputError
from h2s.prefix.adapter import soft_prefix
from h2s.reward.model import RewardModel
from h2s.reward.pairs import (
    context_text,
)

VIRTUAL = 4
LIMIT = 64


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
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder, pairs = given
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    found = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
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
    assert elsewhere(PLAIN, [str(tmp_path / "reward"), pairs], tmp_path) == pytest.approx(scores, abs=1e-5)


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
