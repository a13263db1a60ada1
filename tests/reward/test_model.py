import json
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import sample_context
from transformers import TrainerCallback

from h2s.data.datasets import load_preferences
from h2s.errors import InputError
from h2s.models import load_base_model, load_config, load_tokenizer
from h2s.prefix.adapter import load_weights, prefix_from_hard_prompt, soft_prefix
from h2s.reward.config import RewardModelConfig
from h2s.reward.model import (
    PreferenceCollator,
    RewardModel,
    build_reward_model,
    check_encoder,
    context_text,
    encode_pair,
    max_text_tokens,
    tokenize_preferences,
)
from h2s.reward.trainer import PrefixGradientCheck, PrefixRewardTrainer

VIRTUAL = 4
LIMIT = 64


@pytest.fixture
def bert_tokenizer(bert_folder):
    return load_tokenizer(str(bert_folder))


def build_loud(loud_bert):
    """With a head that is not drawn anew each time, and as loud."""
    torch.manual_seed(0)
    model = build_reward_model(loud_bert, VIRTUAL)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and name.endswith("weight"):
            parameter.data.normal_()
    return model


@pytest.fixture
def bert(loud_bert):
    return build_loud(loud_bert).eval()


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


def test_context_is_its_contents_joined_by_newlines():
    assert context_text(sample_context(0)) == "walk number 0\nwhat did you do?\nI ran."


def test_layout_of_a_pair(bert_tokenizer):
    """Every word here is one token of the vocabulary."""
    encoded = encode_pair(bert_tokenizer, "walk tea", "book rain work", max_tokens=20)
    assert tokens(bert_tokenizer, encoded) == ["[CLS]", "walk", "tea", "[SEP]", "book", "rain", "work", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_layout_is_berts_own(bert_tokenizer):
    """What the tokenizer makes of a pair by itself, where nothing is cut."""
    for context, response in zip(map(context_text, CONTEXTS), RESPONSES, strict=True):
        own = bert_tokenizer(context, response)
        encoded = encode_pair(bert_tokenizer, context, response, 512)
        assert encoded["input_ids"] == own.input_ids
        assert encoded["token_type_ids"] == own.token_type_ids


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


def test_room_beside_the_prefix(bert_folder):
    config = load_config(str(bert_folder))  # 128 positions
    assert max_text_tokens(config, 20, None) == 108
    assert max_text_tokens(config, 20, 108) == 108
    for limit in (109, 4, 0):
        with pytest.raises(InputError, match=r"max_tokens must lie between 5 and 108 .*got"):
            max_text_tokens(config, 20, limit)


def test_full_length_text_runs(bert, bert_tokenizer):
    """The positions of prefix and text together are just enough."""
    model = RewardModel(bert, bert_tokenizer, 128 - VIRTUAL)
    score = model.score([[{"role": "user", "content": "walk " * 300}]], ["tea " * 20])
    assert score.isfinite().all() and model.cuts["context"] == 1 and model.cuts["response"] == 0


def test_reward_model_must_be_a_bert(gemma_folder, bert_folder):
    check_encoder(load_config(str(bert_folder)), load_tokenizer(str(bert_folder)), "it")
    with pytest.raises(InputError, match="it is a gemma3_text model: the reward model must be a BERT"):
        check_encoder(load_config(str(gemma_folder)), load_tokenizer(str(gemma_folder)), "it")


# Scores


@torch.no_grad()
def score_alone(model, tokenizer, context, response):
    """One pair, unpadded, through PEFT's own forward, encoded by the tokenizer itself."""
    return model(**tokenizer(context_text(context), response, return_tensors="pt")).logits.item()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_scores_equal_unpadded_ones_in_order(bert, bert_tokenizer, batch_size):
    model = RewardModel(bert, bert_tokenizer, 128 - VIRTUAL, batch_size)
    expected = [score_alone(bert, bert_tokenizer, c, r) for c, r in zip(CONTEXTS, RESPONSES, strict=True)]
    assert max(expected) - min(expected) > 0.05 and len({round(e, 4) for e in expected}) == len(expected)
    scores = model.score(CONTEXTS, RESPONSES)
    assert scores.shape == (9,) and scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    backwards = model.score(CONTEXTS[::-1], RESPONSES[::-1])
    assert backwards.tolist() == pytest.approx(expected[::-1], abs=1e-5)
    completions = [[{"role": "assistant", "content": r}] for r in RESPONSES]
    assert model(prompts=CONTEXTS, completions=completions) == pytest.approx(expected, abs=1e-5)
    assert not model.cuts["context"]


def test_prefix_and_types_matter(bert, bert_tokenizer):
    """The comparisons here can fail."""
    before = score_alone(bert, bert_tokenizer, CONTEXTS[0], RESPONSES[0])
    swapped = score_alone(bert, bert_tokenizer, [{"content": RESPONSES[0]}], context_text(CONTEXTS[0]))
    with torch.no_grad():
        soft_prefix(bert).neg_()
    after = score_alone(bert, bert_tokenizer, CONTEXTS[0], RESPONSES[0])
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


def test_plain_peft_scores_the_same(bert, bert_tokenizer, tmp_path):
    RewardModel(bert, bert_tokenizer, LIMIT).save(tmp_path / "reward")
    loaded = RewardModel.from_pretrained(str(tmp_path / "reward"))
    assert loaded.max_tokens == LIMIT
    short = [0, 1, 2, 4]
    scores = loaded.score([CONTEXTS[i] for i in short], [RESPONSES[i] for i in short]).tolist()
    assert scores == pytest.approx(
        [score_alone(bert, bert_tokenizer, CONTEXTS[i], RESPONSES[i]) for i in short], abs=1e-5
    )
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


def test_saved_adapter_holds_all_that_is_trained(bert, bert_tokenizer, tmp_path):
    RewardModel(bert, bert_tokenizer, LIMIT).save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["prompt_embeddings"], soft_prefix(bert))
    modules = {name.removeprefix("base_model.") for name in saved} - {"prompt_embeddings"}
    trained = {"bert.pooler.dense", "classifier", "bert.encoder.layer.1.attention.self.query"}
    assert modules == {f"{module}.{part}" for module in trained for part in ("weight", "bias")}


def test_policy_adapter_is_no_reward_model(gemma_folder, tmp_path):
    model = prefix_from_hard_prompt(load_base_model(str(gemma_folder)), [2, 4, 6])
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not a reward adapter"):
        RewardModel.from_pretrained(str(tmp_path))


# Training


def test_columns_of_the_tokenized_pairs(bert_tokenizer):
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "walk"}],
                "chosen": "tea",
                "rejected": "rain cat",
                "conversation": "c",
            }
        ]
    )
    cuts = Counter()
    (row,) = tokenize_preferences(dataset, bert_tokenizer, 6, cuts)
    names = {k: bert_tokenizer.convert_ids_to_tokens(v) for k, v in row.items() if k in ("chosen_ids", "rejected_ids")}
    assert names == {
        "chosen_ids": ["[CLS]", "walk", "[SEP]", "tea", "[SEP]"],
        "rejected_ids": ["[CLS]", "walk", "[SEP]", "rain", "cat", "[SEP]"],
    }
    assert row["chosen_type_ids"] == [0, 0, 0, 1, 1] and row["rejected_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert row["conversation"] == "c"  # what a step is filled by
    assert not +cuts


def test_a_pairs_context_is_counted_as_cut_once(bert_tokenizer):
    """In 6 tokens: whole for both, cut for one, cut for both."""
    prompt = [{"role": "user", "content": "walk"}]
    pairs = [("tea", "cat"), ("tea", "rain cat tea"), ("rain cat tea", "rain tea tea book")]
    rows = [{"prompt": prompt, "chosen": c, "rejected": r, "conversation": "c"} for c, r in pairs]
    cuts = Counter()
    tokenize_preferences(Dataset.from_list(rows), bert_tokenizer, 6, cuts)
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


def test_pairs_of_a_conversation_come_together_in_another_order_each_epoch(build):
    trainer = build(pairs=40, per_device_train_batch_size=1)
    names = trainer.train_dataset["conversation"]
    loader = trainer.get_train_dataloader()
    assert len(set(names)) > 5
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        order = list(loader.batch_sampler.sampler)
        assert sorted(order) == list(range(40))
        visited = [names[i] for i in order]
        assert sum(a != b for a, b in pairwise(visited)) == len(set(names)) - 1
        orders.append(order)
    assert orders[0] == orders[2] != orders[1]


@pytest.fixture
def build(loud_bert, bert_tokenizer, sheet_file, tmp_path):
    """The trainer as the recipe builds it, on a few pairs."""

    def make(callbacks=(PrefixGradientCheck,), pairs=16, **settings):
        model = build_loud(loud_bert)
        dataset = load_preferences(str(sheet_file)).dataset.select(range(pairs))
        rows = tokenize_preferences(dataset, bert_tokenizer, LIMIT, Counter())
        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        } | settings
        return PrefixRewardTrainer(
            model=model,
            args=RewardModelConfig(output_dir=str(tmp_path / "run"), **settings),
            data_collator=PreferenceCollator(bert_tokenizer),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=bert_tokenizer,
            callbacks=[c() for c in callbacks],
        )

    return make


def test_prefix_query_pooler_and_head_are_trained_and_nothing_else(build):
    trainer = build()
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {n for n in before if "prompt_encoder" in n or "modules_to_save" in n}
    trained -= {n for n in trained if n.endswith("classifier.modules_to_save.default.bias")}  # no part of a difference
    trainer.train()
    wrong = []
    for name, parameter in model.named_parameters():
        if name in trained and torch.equal(parameter, before[name]):
            wrong.append(f"{name} did not move")
        if name not in trained and not torch.equal(parameter, before[name]):
            wrong.append(f"{name} moved")
    assert wrong == []
    assert len(trained) == 6 and sum("bert.encoder" in n for n in before) > 20
    # Adam's first steps are about the learning rate long: the prefix got a real gradient.
    assert (soft_prefix(model) - before[next(n for n in trained if "prompt_encoder" in n)]).abs().max() > 1e-3


def test_prefix_and_head_have_their_own_learning_rates(build):
    """Each Adam's first step is its learning rate long, whatever the gradient."""
    trainer = build(learning_rate=0.5, head_learning_rate=0.01)
    bert, optimizer = trainer.model, trainer.create_optimizer()
    before = {name: p.detach().clone() for name, p in bert.named_parameters() if p.requires_grad}
    for parameter in bert.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in bert.named_parameters():
        if name in before:
            step = 0.5 if "prompt_encoder" in name else 0.01
            torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, step))


def test_the_prefix_begins_small(bert_folder):
    """PEFT draws it from N(0, 1); a tenth of that leaves the encoder nearly as it was."""
    torch.manual_seed(0)
    prefix = soft_prefix(build_reward_model(str(bert_folder), 100))
    assert prefix.std().item() == pytest.approx(0.1, rel=0.05)


@torch.no_grad()
def test_the_last_layer_begins_by_looking_at_all_tokens_alike(bert_folder, bert_tokenizer):
    """[CLS] of the last layer against the mean of its values over prefix and text, computed from the layer's input."""
    model = build_reward_model(str(bert_folder), VIRTUAL).eval()
    attention = model.get_base_model().bert.encoder.layer[-1].attention.self
    seen = {}
    attention.value.register_forward_hook(lambda module, inputs, output: seen.update(values=output))
    attention.register_forward_hook(lambda module, inputs, output: seen.update(mixed=output[0]))
    model(**bert_tokenizer("walk tea", "rain work", return_tensors="pt"))
    prefix = soft_prefix(model).view(VIRTUAL, -1, 2, attention.all_head_size)[:, -1, 1]  # the last layer's values
    expected = torch.cat([prefix, seen["values"][0]]).mean(0)
    torch.testing.assert_close(seen["mixed"][0, 0], expected)


def test_loss_is_the_pairwise_logistic_loss(build, bert_tokenizer):
    """One batch by hand: mean of ln(1 + exp(worse - better)), each score one pair at a time."""
    trainer = build(pairs=4)
    model = trainer.model.eval()
    rows = list(trainer.train_dataset)
    terms = []
    with torch.no_grad():
        for row in rows:
            better, worse = (
                model(
                    input_ids=torch.tensor([row[f"{side}_ids"]]), token_type_ids=torch.tensor([row[f"{side}_type_ids"]])
                ).logits.item()
                for side in ("chosen", "rejected")
            )
            terms.append(math.log1p(math.exp(worse - better)))
        loss = trainer.compute_loss(model, dict(PreferenceCollator(bert_tokenizer)(rows)))
    assert max(terms) - min(terms) > 1e-4
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-5)


def test_prefix_alone_learns_a_rule(build):
    """The reply that asks is better. With its head frozen BERT has only the prefix to learn with."""
    trainer = build(
        pairs=40, max_steps=60, per_device_train_batch_size=16, learning_rate=3e-2, lr_scheduler_type="constant"
    )
    for name, parameter in trainer.model.named_parameters():
        if "classifier" in name:
            parameter.requires_grad_(False)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-5:]) / 5 < 0.5 * sum(losses[:5]) / 5, losses


class CutThePrefix(PrefixGradientCheck):
    """The check, after something has taken the prefix's gradient away."""

    gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        soft_prefix(model).grad = self.gradient and torch.zeros_like(soft_prefix(model))
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)


class ZeroThePrefix(CutThePrefix):
    gradient = "zero"


@pytest.mark.parametrize("callback", [CutThePrefix, ZeroThePrefix])
def test_a_prefix_without_gradient_ends_the_run(build, callback):
    with pytest.raises(RuntimeError, match="the prefix has no gradient at the first step"):
        build(callbacks=(callback,)).train()


def test_gradient_checkpointing_is_refused(tmp_path):
    with pytest.raises(InputError, match="gradient_checkpointing"):
        RewardModelConfig(output_dir=str(tmp_path), gradient_checkpointing=True)
    assert RewardModelConfig(output_dir=str(tmp_path)).gradient_checkpointing is not True


def test_best_epoch_is_that_of_the_lowest_loss(build):
    """Which is neither the last nor the most accurate."""
    course = iter([(0.4, 0.7), (0.1, 0.8), (0.3, 0.9)])

    class Course(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics |= dict(zip(("eval_loss", "eval_accuracy"), next(course), strict=True))

    trainer = build(
        callbacks=(Course,), max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    at_last = soft_prefix(trainer.model).detach().clone()
    load_weights(trainer.model, trainer.state.best_model_checkpoint)
    assert not torch.equal(soft_prefix(trainer.model), at_last)
