"""The dial, and several prefixes of one hard prompt, beside each of them loaded alone."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from elsewhere import elsewhere
from peft.utils.hotswap import hotswap_adapter
from tiny import HARD_PROMPT, sample_context, save_gemma
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from h2s import InputError, PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.prefix import named_prefixes
from h2s.prefix.adapter import HARD, SOFT, hard_prefix, load_weights, soft_prefix

CONVERSATIONS = [sample_context(i) for i in range(5)]
SAMPLED = {"max_completion_length": 8, "temperature": 1.0, "seed": 3}


def move(policy, seed=1):
    """As far as training might, and then some."""
    weight = soft_prefix(policy.model)
    with torch.no_grad():
        weight.add_(2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return weight.detach().clone()


@torch.no_grad()
def logits(policy):
    return [policy.model(torch.tensor([ids])).logits for ids in policy.encode(CONVERSATIONS, 1)]


def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# The dial


def test_the_dial_is_exact_at_both_ends_and_a_line_between(policy):
    """To the last bit at 0 and 1, from wherever it was before; in between and beyond by hand, in float64."""
    trained, hard = move(policy), hard_prefix(policy.model)
    replies = policy.generate(CONVERSATIONS, **SAMPLED)
    with policy.hard_prompt_active():
        of_hard = policy.generate(CONVERSATIONS, **SAMPLED)
    assert replies != of_hard
    for strength in (0.3, 0, 1.5, 1, 0.5, 0.0, 1.0):
        policy.set_strength(strength)
        now = soft_prefix(policy.model)
        expected = hard.double() + strength * (trained.double() - hard.double())
        assert torch.allclose(now.double(), expected, rtol=0, atol=1e-5) and now.requires_grad
        if strength in (0, 1):
            assert torch.equal(now, trained if strength else hard)
            assert policy.generate(CONVERSATIONS, **SAMPLED) == (replies if strength else of_hard)
    assert torch.equal(hard, policy.model.prompt_encoder[HARD].embedding.weight)


def test_the_model_may_be_moved_in_between(policy):
    trained = move(policy)
    policy.set_strength(0.5)
    policy.model.to(torch.float64)
    policy.set_strength(1)
    assert torch.allclose(soft_prefix(policy.model), trained.double(), rtol=0, atol=1e-6)


def test_a_prefix_that_was_never_trained_is_the_hard_prompt_at_every_strength(policy):
    for strength in (0.5, 1.5, 0, 1):
        policy.set_strength(strength)
        assert torch.allclose(soft_prefix(policy.model), hard_prefix(policy.model), rtol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.51, float("nan"), float("inf"), "1", None])
def test_a_strength_that_is_none(policy, strength):
    trained = move(policy)
    with pytest.raises(InputError, match=r"a strength must be a number from 0, the hard prompt, to 1.5 \(1 is the t"):
        policy.set_strength(strength)
    assert torch.equal(soft_prefix(policy.model), trained)


def test_what_training_makes_is_the_new_soft_prefix(policy, tmp_path):
    """Trained at strength 0.5 it goes on from there, and what comes of it is what the dial's 1 means."""
    first, hard = move(policy), hard_prefix(policy.model)
    policy.save_pretrained(tmp_path / "first")
    policy.set_strength(0.5)
    half = soft_prefix(policy.model).detach().clone()
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 4, "learning_rate": 1e-2}
    args = SingleStepPPOConfig(str(tmp_path / "run"), report_to="none", save_strategy="no", **settings)
    contexts = Dataset.from_dict({"prompt": CONVERSATIONS[:4]})
    SingleStepPPOTrainer(policy, length, args, contexts).train()
    second = soft_prefix(policy.model).detach().clone()
    assert 0 < (second - half).abs().max() < 0.1 < (second - first).abs().max()
    for strength, expected in ((0, hard), (0.5, (second + hard) / 2), (1, second)):
        policy.set_strength(strength)
        assert torch.allclose(soft_prefix(policy.model), expected, rtol=0, atol=1e-6 if strength == 0.5 else 0)
    policy.set_strength(0.25)
    load_weights(policy.model, tmp_path / "first")  # as a run does that is gone on with
    policy.set_strength(1)
    assert torch.equal(soft_prefix(policy.model), first)


# Loads what was saved with no h2s in sight.
PLAIN = """
import torch
from peft import AutoPeftModelForCausalLM

folder, rows = given
model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    found = [model(torch.tensor([ids])).logits.tolist() for ids in rows]
"""


def test_saved_at_a_strength_it_is_a_plain_adapter(policy, tmp_path):
    """For peft without h2s it is the prefix as it was then; loaded again its own strength is 1."""
    move(policy)
    policy.set_strength(0.7)
    policy.save_pretrained(tmp_path / "adapter")
    found = elsewhere(PLAIN, [str(tmp_path / "adapter"), policy.encode(CONVERSATIONS, 1)], tmp_path)
    assert same(logits(policy), [torch.tensor(x) for x in found])
    loaded = PrefixTuningPolicyModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    loaded.set_strength(1)
    assert torch.equal(soft_prefix(loaded.model), soft_prefix(policy.model))


def test_a_sharded_prefix_is_refused(policy, policy_adapter, tmp_path, request):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    sharded = distribute_tensor(soft_prefix(policy.model).data, init_device_mesh("cpu", (1,)))
    policy.model.prompt_encoder[SOFT].embedding.weight = torch.nn.Parameter(sharded)
    for call in (lambda: policy.set_strength(0.5), lambda: policy.load_adapter(policy_adapter, "other")):
        with pytest.raises(InputError, match="the prefix is sharded over processes: save it, and load the adapter in"):
            call()


# Several prefixes


@pytest.fixture
def other(gemma_folder, tmp_path):
    """Another prefix of the same hard prompt, alone in its model, and saved."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="float32")
    move(policy, 5)
    policy.prefix = policy.prefix.having_seen(["0" * 16])
    policy.save_pretrained(tmp_path / "other")
    return policy


def test_each_prefix_answers_as_it_does_alone(policy, other, tmp_path):
    """To the last bit; so does the hard prompt between them, after which the one that was active is so again."""
    move(policy)
    own, own_logits, own_prefix = policy.generate(CONVERSATIONS, **SAMPLED), logits(policy), policy.prefix
    policy.load_adapter(tmp_path / "other", "shop")
    assert policy.active == policy.model.active_adapter == SOFT and same(logits(policy), own_logits)
    policy.set_adapter("shop")
    assert policy.active == policy.model.active_adapter == "shop"
    assert same(logits(policy), logits(other)) and not same(logits(policy), own_logits)
    assert policy.generate(CONVERSATIONS, **SAMPLED) == other.generate(CONVERSATIONS, **SAMPLED) != own
    assert policy.prefix == other.prefix != own_prefix
    with policy.hard_prompt_active():
        assert policy.model.active_adapter == HARD
        with pytest.raises(InputError, match=r"set_adapter has no effect within hard_prompt_active\(\): call it outs"):
            policy.set_adapter(SOFT)
    assert policy.model.active_adapter == "shop"
    policy.set_adapter(SOFT)
    assert same(logits(policy), own_logits) and policy.prefix == own_prefix
    assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == [
        f"prompt_encoder.{SOFT}.embedding.weight"
    ]


def test_each_prefix_has_its_own_dial(policy, other, tmp_path):
    trained = move(policy)
    policy.load_adapter(tmp_path / "other", "shop")
    policy.set_strength(0.5)
    half = soft_prefix(policy.model).detach().clone()
    policy.set_adapter("shop")
    assert torch.equal(soft_prefix(policy.model, "shop"), soft_prefix(other.model))
    other.set_strength(1.25)
    policy.set_strength(1.25)
    assert torch.equal(soft_prefix(policy.model, "shop"), soft_prefix(other.model))
    assert torch.equal(soft_prefix(policy.model), half)
    policy.set_adapter(SOFT)
    policy.set_strength(1)
    assert torch.equal(soft_prefix(policy.model), trained)


def test_what_the_policy_learns_stays_its_own(policy, other, tmp_path):
    """The list of what it has seen goes with the prefix that saw it."""
    policy.load_adapter(tmp_path / "other", "shop")
    policy.prefix = policy.prefix.having_seen(["1" * 16])
    policy.set_adapter("shop")
    assert policy.prefix.seen == ["0" * 16]
    policy.set_adapter(SOFT)
    assert policy.prefix.seen == ["1" * 16]
    policy.save_pretrained(tmp_path / "own")
    loaded = PrefixTuningPolicyModel.from_pretrained(tmp_path / "own", dtype="float32")
    assert loaded.prefix == policy.prefix and not (tmp_path / "own" / "shop").exists()


def test_what_nothing_trained_is_the_hard_prompt_in_this_dtype(gemma_folder, policy_adapter):
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="bfloat16")
    policy.load_adapter(policy_adapter, "start")
    assert torch.equal(soft_prefix(policy.model, "start"), hard_prefix(policy.model))


def test_another_prefix_is_neither_saved_nor_trained(policy, other, tmp_path):
    policy.load_adapter(tmp_path / "other", "shop")
    policy.set_adapter("shop")
    for what, call in {
        "saved": lambda: policy.save_pretrained(tmp_path / "again"),
        "trained": lambda: SingleStepPPOTrainer(policy, length),
    }.items():
        with pytest.raises(InputError, match=rf"'shop' is active, and 'default' alone can be {what}: set_adapter\('de"):
            call()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"hard_prompt": "Be brief."}, "hard_prompt"),
        ({"opening_messages": [{"role": "system", "content": "Be brief."}], "text": "<bos>"}, "opening_messages, text"),
        ({"chat_template_kwargs": {"style": "warm"}}, "chat_template_kwargs"),
        ({"question_prefix": "The question: "}, "question_prefix"),
        ({"token_ids": [2, 3]}, "token_ids"),
    ],
)
def test_another_prompts_prefix_is_refused(policy, other, tmp_path, changed, fields):
    replace(other.prefix, **changed).save(tmp_path / "other")
    with pytest.raises(
        InputError, match=rf"other is not of this policy's hard prompt, and .*: {fields} in h2s.json dif"
    ):
        policy.load_adapter(tmp_path / "other", "shop")
    assert set(policy.model.peft_config) == {SOFT, HARD}


def test_another_base_models_prefix_is_refused(policy, tmp_path):
    base = save_gemma(tmp_path / "base")
    PrefixTuningPolicyModel.from_hard_prompt(str(base), HARD_PROMPT).save_pretrained(tmp_path / "other")
    expected = "other was made for another base model: expected .*/tiny-gemma .*, got .*/base "
    with pytest.raises(InputError, match=expected):
        policy.load_adapter(tmp_path / "other", "shop")


@pytest.mark.parametrize(
    ("ours", "theirs", "refused"),
    [("v1", "v2", True), ("v1", "v1", False), (None, "v2", False), ("v1", None, False)],
)
def test_another_revision_of_the_base_is_refused_where_both_are_known(policy, other, tmp_path, ours, theirs, refused):
    policy.model.peft_config[SOFT].revision = ours
    file = tmp_path / "other" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": theirs}))
    if refused:
        with pytest.raises(InputError, match=r"expected .* \(revision v1\), got .* \(revision v2\)"):
            policy.load_adapter(tmp_path / "other", "shop")
    else:
        policy.load_adapter(tmp_path / "other", "shop")


def test_another_quantization_of_the_base_is_refused(policy, other, tmp_path):
    replace(other.prefix, quantization={"load_in_4bit": True}).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"in another quantization: expected None, got .*load_in_4bit"):
        policy.load_adapter(tmp_path / "other", "shop")


@pytest.mark.parametrize(("source", "refused"), [("google/gemma-3-1b-it", False), ("google/gemma-3-12b-it", True)])
def test_a_base_in_the_hubs_cache_is_the_one_of_its_name(
    policy, other, gemma_folder, tmp_path, monkeypatch, source, refused
):
    """What is published names its base; the policy may have it from the cache's folder, which tells name and commit."""
    snapshot = tmp_path / "hub" / "models--google--gemma-3-1b-it" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(gemma_folder)
    policy.model.peft_config[SOFT].base_model_name_or_path = str(snapshot)
    published = replace(PrefixTuningPolicyModel.open(tmp_path / "other"), source=source)
    monkeypatch.setattr(named_prefixes, "open_adapter", lambda *arguments, **download: published)
    if refused:
        with pytest.raises(
            InputError, match=r"expected google/gemma-3-1b-it \(revision 0a1b\), got google/gemma-3-12b"
        ):
            policy.load_adapter("me/shop", "shop")
    else:
        policy.load_adapter("me/shop", "shop")


NAMES = [SOFT, HARD, "shop", "keys", "a.b", "", "ref", "tuning"]  # "keys" is a method of torch's ModuleDict


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be(policy, other, tmp_path, name):
    policy.load_adapter(tmp_path / "other", "shop")
    with pytest.raises(InputError, match=f"a prefix cannot be called '{name}'"):
        policy.load_adapter(tmp_path / "other", name)


def test_a_prefix_that_is_not_there(policy, tmp_path):
    for name in ("shop", HARD):
        with pytest.raises(InputError, match=f"no prefix is called '{name}' here: there are default"):
            policy.set_adapter(name)
    with pytest.raises(InputError, match="no such adapter folder"):
        policy.load_adapter(tmp_path / "nowhere", "shop")


def test_what_peft_cannot_do_with_a_prefix(policy, other, tmp_path):
    """As README says it. `adapter_names` is the one to beware of: it is taken, and every row gets the active prefix."""
    move(policy)
    policy.load_adapter(tmp_path / "other", "shop")
    model, ids = policy.model, torch.tensor([[7, 8, 9, 10]] * 2)
    for name in ("merge_and_unload", "merge_adapter", "add_weighted_adapter"):
        with pytest.raises(AttributeError, match=name):
            getattr(model, name)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but PREFIX_TUNING was passed"):
        hotswap_adapter(model, str(tmp_path / "other"), SOFT, torch_device="cpu")
    with torch.no_grad():
        of_own = model(ids).logits
        assert torch.equal(model(ids, adapter_names=[SOFT, "shop"]).logits, of_own)
        policy.set_adapter("shop")
        assert not torch.allclose(model(ids).logits[1], of_own[1], atol=0.1)
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=ids, adapter_names=[SOFT, "shop"], max_new_tokens=2)
