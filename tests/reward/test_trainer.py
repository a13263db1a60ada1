import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, TaskType
from safetensors.torch import load, load_file
from transformers import BertForSequenceClassification, TrainerCallback

from h2s import InputError, RewardModel, RewardModelConfig, RewardModelTrainer, load_preferences
from h2s.data.splits import conversations_in
from h2s.errors import RunError
from h2s.models import load_base_model, load_tokenizer
from h2s.prefix.adapter import soft_prefix

VIRTUAL, LIMIT = 4, 64
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
ADAPTER = "adapter_model.safetensors"


def prefix_of(length):
    return PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=length)


@pytest.fixture
def build(loud_bert, sheet_file, tmp_path):
    """A trainer as a user makes one, on a few pairs; `given` are its own arguments and settings."""
    judged = load_preferences(str(sheet_file))

    def make(pairs=16, folder="run", margins=None, **given):
        arguments = {"model": loud_bert, "peft_config": prefix_of(VIRTUAL), "eval_dataset": judged.select(range(6))}
        taken = [*arguments, "callbacks", "processing_class"]
        arguments |= {name: given.pop(name) for name in taken if name in given}
        settings = {
            "max_steps": 2,
            "max_tokens": LIMIT,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        args = RewardModelConfig(output_dir=str(tmp_path / folder), **settings | given)
        train = judged.select(range(pairs))
        if margins is not None:
            train = train.add_column("margin", margins)
        return RewardModelTrainer(args=args, train_dataset=train, **arguments)

    return make


class Course(TrainerCallback):
    """Says how evaluations end: the second loss is the lowest, neither the last nor the most accurate."""

    def __init__(self):
        self.course = iter([(0.4, 0.7), (0.1, 0.8), (0.3, 0.9)])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics |= dict(zip(("eval_loss", "eval_accuracy"), next(self.course), strict=True))


def trained_by(model):
    """A copy of all that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def saved(reward, folder):
    reward.save_pretrained(folder)
    return load_file(folder / ADAPTER)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# What it is given


def test_prefix_of_twenty_by_default_or_of_what_is_asked(build):
    for config, length in ((None, 20), (prefix_of(7), 7)):
        trainer = build(peft_config=config)
        assert soft_prefix(trainer.reward_model.model).shape[0] == length
        assert trainer.reward_model.model.peft_config["default"].num_virtual_tokens == length


def test_a_model_and_its_name_begin_and_end_alike(build, loud_bert):
    """Its tokenizer is found by the name that it was loaded from, or given."""
    kinds = {
        "name": {"model": loud_bert},
        "model": {"model": BertForSequenceClassification.from_pretrained(loud_bert, num_labels=1)},
        "both": {
            "model": BertForSequenceClassification.from_pretrained(loud_bert, num_labels=1),
            "processing_class": load_tokenizer(loud_bert),
        },
    }
    starts, ends = {}, {}
    for name, given in kinds.items():
        trainer = build(folder=name, **given)
        starts[name] = trained_by(trainer.reward_model.model)
        trainer.train()
        ends[name] = trained_by(trainer.reward_model.model)
    assert same(starts["name"], starts["model"]) and same(starts["name"], starts["both"])
    assert same(ends["name"], ends["model"]) and same(ends["name"], ends["both"])
    assert not same(starts["name"], ends["name"])
    other = build(folder="other", seed=1)
    assert not torch.equal(*(soft_prefix(t.reward_model.model) for t in (other, build(folder="again"))))


def test_no_evaluation_without_an_eval_dataset(build):
    """As a beginner makes one: it runs, nothing is evaluated, and the last step is kept."""
    trainer = build(eval_dataset=None, save_strategy="steps", save_steps=1)
    trainer.train()
    assert not any(name.startswith("eval") for line in trainer.state.log_history for name in line)
    root = Path(trainer.args.output_dir)
    assert [f.name for f in root.glob("checkpoint-*")] == ["checkpoint-2"]
    assert same(saved(trainer.reward_model, root / "end"), load_file(root / "checkpoint-2" / ADAPTER))
    assert not trainer.reward_model.model.training


def test_text_tokens_are_those_of_the_settings(build):
    for limit, expected in ((10, 10), (None, 128 - VIRTUAL)):
        trainer = build(max_tokens=limit)
        assert trainer.reward_model.max_tokens == expected
        lengths = [len(ids) for ids in trainer.train_dataset["chosen_ids"]]
        assert max(lengths) == 10 if limit else max(lengths) > 10
        assert (trainer.cuts["context"] > 0) == (limit is not None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft_config": LoraConfig(task_type=TaskType.SEQ_CLS)}, "peft_config must be a PrefixTuningConfig of task"),
        (
            {"peft_config": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)},
            "must be a PrefixTuningConfig of task SEQ_CLS",
        ),
        ({**EVERY_STEP, "eval_dataset": None}, "eval_strategy is steps, but there is no eval_dataset"),
        ({"eval_strategy": "epoch"}, "save_strategy must be as eval_strategy, which is epoch, .*got no"),
        ({**EVERY_STEP, "save_steps": 2}, "save_strategy must be as eval_strategy, .*with the same steps"),
        ({"eval_dataset": {"a": None}}, "eval_dataset must be a datasets.Dataset .*got dict"),
        ({"eval_dataset": Dataset.from_dict({"text": ["a"]})}, "columns prompt, chosen and rejected, got .*'text'"),
        ({"processing_class": "nonsense"}, "processing_class is for a model that is loaded already"),
        ({"max_tokens": 125}, "max_tokens must lie between 5 and 124 .*got 125"),
        ({"max_tokens": 4}, "max_tokens must lie between 5 and 124 .*got 4"),
        ({"peft_config": prefix_of(200)}, "max_tokens must lie between"),
        ({"model": "no/such/model"}, "no/such/model is not a model folder"),
    ],
)
def test_what_is_refused(build, given, message):
    with pytest.raises(InputError, match=message) as caught:
        build(**given)
    assert "\n" not in str(caught.value)


def test_what_is_no_bert_is_refused(build, gemma_folder, loud_bert):
    with pytest.raises(InputError, match="is a gemma3_text model: the reward model must be a BERT"):
        build(model=str(gemma_folder))
    bert = BertForSequenceClassification.from_pretrained(loud_bert, num_labels=2, ignore_mismatched_sizes=True)
    for model in (load_base_model(str(gemma_folder)), bert, bert.bert, build().reward_model.model):
        with pytest.raises(
            InputError, match=f"must be a name, or a BERT, .* with one label, got a {type(model).__name__}"
        ):
            build(model=model)


def test_judgements_are_needed(loud_bert, tmp_path):
    with pytest.raises(InputError, match=r"train_dataset must be .*got NoneType; load_preferences reads judgements"):
        RewardModelTrainer(loud_bert, RewardModelConfig(output_dir=str(tmp_path)))


def test_judgements_may_be_given_to_evaluate(build, loud_bert, sheet_file):
    """The loss by hand: ln(1 + exp(rejected - chosen)), a mean over pairs."""
    trainer = build(model=Path(loud_bert))
    pairs = load_preferences(str(sheet_file)).select(range(6, 12))
    found = trainer.evaluate(pairs)["eval_loss"]
    chosen, rejected = (trainer.reward_model.score(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected"))
    assert found == pytest.approx(torch.log1p((rejected - chosen).exp()).mean().item(), abs=1e-5)
    with pytest.raises(InputError, match=r"eval_dataset must be a datasets\.Dataset with the columns prompt"):
        trainer.evaluate(pairs.remove_columns("chosen"))


def test_the_callers_settings_stay_as_they_were(loud_bert, sheet_file, tmp_path):
    """They make several trainers: the judge's, each fold's."""
    args = RewardModelConfig(
        output_dir=str(tmp_path), max_steps=1, report_to="none", save_total_limit=2, eval_strategy="epoch"
    )
    before = json.dumps(args.to_dict(), sort_keys=True, default=str)
    pairs = load_preferences(str(sheet_file)).select(range(8))
    RewardModelTrainer(loud_bert, args, pairs, pairs).train()
    assert json.dumps(args.to_dict(), sort_keys=True, default=str) == before


# What it learns


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
    assert sum("encoder.layer.1.attention.self.query" in n for n in trained) == 2
    # Adam's first steps are about the learning rate long: the prefix got a real gradient.
    assert (soft_prefix(model) - before[next(n for n in trained if "prompt_encoder" in n)]).abs().max() > 1e-3


def test_prefix_and_head_have_their_own_learning_rates(build):
    """Each Adam's first step is its learning rate long, whatever the gradient."""
    trainer = build(learning_rate=0.5, head_learning_rate=0.01)
    bert, optimizer = trainer.model, trainer.create_optimizer()
    before = trained_by(bert)
    for parameter in bert.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in bert.named_parameters():
        if name in before:
            step = 0.5 if "prompt_encoder" in name else 0.01
            torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, step))


@pytest.mark.parametrize("asked", [None, [0.5, -1.0, 2.0, 0.0]])
def test_loss_and_accuracy_by_hand(build, asked):
    """The mean of ln(1 + exp(worse + margin - better)), each score one pair at a time."""
    trainer = build(pairs=4, margins=asked)
    model = trainer.model.eval()

    @torch.no_grad()
    def margins(rows):
        for row in rows:
            better, worse = (
                model(
                    input_ids=torch.tensor([row[f"{side}_ids"]]), token_type_ids=torch.tensor([row[f"{side}_type_ids"]])
                ).logits.item()
                for side in ("chosen", "rejected")
            )
            yield better - worse

    rows = list(trainer.train_dataset)
    terms = [math.log1p(math.exp(a - margin)) for a, margin in zip(asked or [0] * 4, margins(rows), strict=True)]
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(trainer.data_collator(rows)))
    assert max(terms) - min(terms) > 1e-4
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-5)
    held_out = list(margins(trainer.eval_dataset))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in held_out) / 6, abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(sum(m > 0 for m in held_out) / 6)


def test_a_run_in_the_terminal(build, capsys):
    """Steps and evaluations, in the numbers of the log; one that is asked for later has its own name."""
    trainer = build(**EVERY_STEP)
    trainer.train()
    trainer.evaluate(metric_key_prefix="later")
    trained, evaluated, *_, end, later = capsys.readouterr().out.splitlines()
    log = trainer.state.log_history
    assert trained.startswith(
        f"step 1 of 2: epoch 0.25, loss {log[0]['loss']:.4f}, accuracy {log[0]['accuracy']:.4f}, "
    )
    loss, accuracy = (log[1][f"eval_{name}"] for name in ("loss", "accuracy"))
    assert evaluated == f"step 1 of 2: epoch 0.25, eval_loss {loss:.4f}, eval_accuracy {accuracy:.4f}"
    assert end.startswith("step 2 of 2: trained in 00:") and "later_loss" in later


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


@pytest.mark.parametrize("gradient", [None, "zero"])
def test_a_prefix_without_gradient_ends_the_run(build, gradient):
    trainer = build()
    prefix = soft_prefix(trainer.model)
    if gradient is None:
        prefix.requires_grad_(False)
    else:
        prefix.register_hook(torch.zeros_like)
    with pytest.raises(RunError, match="the prefix has no gradient at the first step"):
        trainer.train()


@pytest.mark.parametrize("part", ["prompt_encoder", "pooler", "classifier"])
def test_a_gradient_that_is_no_number_ends_the_run(build, part):
    """Before the step: nothing of it is in the weights."""
    trainer = build()
    parameter = next(p for name, p in trainer.model.named_parameters() if p.requires_grad and part in name)
    steps = iter([1.0, math.nan])
    parameter.register_hook(lambda gradient: gradient * next(steps))
    with pytest.raises(RunError, match="the gradient of step 2 is not finite: lower learning_rate"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# What is kept


@pytest.mark.parametrize("given", [{}, {"load_best_model_at_end": True}], ids=str)
def test_best_epoch_is_that_of_the_lowest_loss(build, given):
    trainer = build(callbacks=[Course()], max_steps=3, save_total_limit=None, **EVERY_STEP, **given)
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]  # Trainer's own way makes an adapter of each checkpoint
    root = Path(trainer.args.output_dir)
    assert trainer.state.best_model_checkpoint == str(root / "checkpoint-2")
    kept = saved(trainer.reward_model, root / "kept")
    found = [same(kept, load_file(root / f"checkpoint-{n}" / ADAPTER)) for n in (1, 2, 3)]
    assert found == [False, True, False]
    assert not trainer.reward_model.model.training
    # What was trained goes on being what scores.
    assert trainer.reward_model.model is trainer.model


def test_the_newest_and_the_best_checkpoint_are_left(build):
    trainer = build(callbacks=[Course()], max_steps=3, save_total_limit=1, **EVERY_STEP)
    trainer.train()
    root = Path(trainer.args.output_dir)
    assert sorted(f.name for f in root.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_saved_model_is_a_reward_model(build, tmp_path):
    """By Trainer's own names for it: no pickle, and plain PEFT's files with ours."""
    trainer = build()
    trainer.train()
    for folder, call in ((tmp_path / "saved", trainer.save_model), (tmp_path / "run", lambda _: trainer.save_model())):
        call(str(folder))
        assert {"adapter_config.json", ADAPTER, "tokenizer.json", "h2s.json", "README.md"} <= {
            f.name for f in folder.iterdir()
        }
        assert not list(folder.glob("*.bin"))
        loaded = RewardModel.from_pretrained(folder)
        pairs = ["walk", "tea"], ["how was it?", "I see."]
        assert loaded.max_tokens == LIMIT
        torch.testing.assert_close(loaded.score(*pairs), trainer.reward_model.score(*pairs))


def test_a_saved_model_says_what_trained_and_selected_it(build, sheet_file):
    """Wherever it lies: with each checkpoint, and at the end."""
    judged = load_preferences(str(sheet_file))
    train, select = judged.select(range(16)), judged.select(range(20, 26))
    for given, parts in (({"eval_dataset": select}, (train, select)), ({"eval_dataset": None}, (train,))):
        trainer = build(folder=f"of-{len(parts)}", save_strategy="steps", save_steps=1, max_steps=1, **given)
        trainer.train()
        trainer.save_model()
        root, expected = Path(trainer.args.output_dir), conversations_in(*parts)
        assert len(expected) == {1: 8, 2: 11}[len(parts)] and trainer.reward_model.seen == expected
        for folder in (root, root / "checkpoint-1"):
            assert json.loads((folder / "h2s.json").read_text(encoding="utf-8"))["seen"] == expected


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
def test_a_resumed_run_ends_in_the_same_bits(build, resume):
    """In its second epoch, and mid-epoch: weights, both moments of the optimizer, losses."""
    settings = {"max_steps": 6, "save_total_limit": None, "save_steps": 2, "eval_steps": 2}
    settings = EVERY_STEP | settings
    whole = build(folder="whole", **settings)
    whole.train()
    build(folder="broken", callbacks=[StopAfter(2)], **settings).train()
    resumed = build(folder="broken", **settings)
    root = Path(resumed.args.output_dir)
    assert (root / "checkpoint-2").is_dir() and not (root / "checkpoint-4").exists()
    resumed.train(resume_from_checkpoint=resume if resume is True else root / resume)
    first, second = Path(whole.args.output_dir) / "checkpoint-6", root / "checkpoint-6"
    assert same(load_file(first / ADAPTER), load_file(second / ADAPTER))
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in (first, second)]
    assert len(states[0]) == 7
    assert all(same(states[0][i], states[1][i]) for i in states[0])
    losses = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in t.state.log_history if "step" in line][:-1]
        for t in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    assert same(trained_by(whole.reward_model.model), trained_by(resumed.reward_model.model))


def test_a_run_that_was_moved_keeps_its_best_epoch(build):
    """The checkpoint's own note of where that lies names a folder that is gone."""
    settings = EVERY_STEP | {"max_steps": 3, "save_total_limit": None, "greater_is_better": True}  # the loss falls
    first = build(folder="here", **settings)
    first.train()
    best, root = first.state.best_global_step, Path(first.args.output_dir)
    assert best < 3
    moved = build(folder="there", **settings)
    there = root.rename(root.with_name("there"))
    moved.train(resume_from_checkpoint=True)
    of_best, of_last = (load_file(there / f"checkpoint-{n}" / ADAPTER)["prompt_embeddings"] for n in (best, 3))
    assert torch.equal(soft_prefix(moved.reward_model.model), of_best) and not torch.equal(of_best, of_last)


# What leaves the machine


@pytest.mark.parametrize(("asked", "repo"), [("me/kind", "me/kind"), (None, "me/run")])
def test_push_is_the_kept_adapter_and_nothing_else(build, hub, published, asked, repo):
    trainer = build(
        model=str(published["makers/tiny-bert"]),
        callbacks=[Course()],
        max_steps=3,
        save_total_limit=None,
        push_to_hub=True,
        hub_model_id=asked,
        **EVERY_STEP,
    )
    trainer.train()
    files = hub.repositories[repo].files()
    assert files.keys() - {".gitattributes"} == {
        *("adapter_config.json", ADAPTER, "tokenizer.json", "tokenizer_config.json", "h2s.json", "README.md")
    }
    root = Path(trainer.args.output_dir)
    assert same(load(files[ADAPTER]), load_file(root / "checkpoint-2" / ADAPTER))
    card = files["README.md"].decode()
    assert card.count(f'.from_pretrained("{repo}"') == 2 and str(root.parent) not in card
    assert trainer.push_to_hub(report="Accuracy 0.9.") == f"{hub.url}/{repo}"
    assert "Accuracy 0.9." in hub.repositories[repo].files()["README.md"].decode()
