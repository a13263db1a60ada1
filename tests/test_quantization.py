"""A prefix on a base in 4 bits, beside the same weights taken out of their 4 bits by bitsandbytes' own function."""

import json
import shutil

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from ppo.conftest import SMALL_AND_QUIET
from ppo.runs import contexts_of, logged, prefix_of, root_of, saved_prefix, varied
from test_hub import run_example
from tiny import HARD_PROMPT, sample_context, save_gemma
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, pipeline

import h2s.quantization
from h2s import InputError, PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.errors import RunError
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.chat_template import ChatPrefix
from h2s.prefix.opened import open_hard_prompt
from h2s.quantization import check_quantization, keep_trainable, quantization_settings

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED = {**NF4, "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Gemma whose layers are made of blocks of 64 weights, which share a scale; its replies are no repetition."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": False}
    return str(save_gemma(tmp_path_factory.mktemp("models") / "gemma-of-blocks", **sizes))


def plain(folder, settings=NF4):
    """As transformers loads it, with no h2s."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))


def dequantised(folder, settings=NF4):
    """The float model with the weights that the 4 bits stand for."""
    quantised, model = plain(folder, settings), AutoModelForCausalLM.from_pretrained(folder)
    layers = [(name, layer) for name, layer in quantised.named_modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 4 * 7
    for name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        model.get_submodule(name).weight.data.copy_(weight)
    return model.eval()


def quantised_policy(folder, settings=NF4):
    return PrefixTuningPolicyModel.from_hard_prompt(
        folder, HARD_PROMPT, quantization_config=BitsAndBytesConfig(**settings)
    )


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    saved = tmp_path_factory.mktemp("adapters") / "in-4-bits"
    quantised_policy(folder).save_pretrained(saved)
    return saved


# What it computes


@torch.no_grad()
def largest_difference(policy, base):
    """Of a logit, relative to the largest: one ragged batch behind the prefix, row by row behind the hard prompt."""
    policy.tokenizer.padding_side = "right"
    rows = policy.encode([sample_context(i) for i in range(4)], 1)
    batch = policy.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert batch["attention_mask"].sum(1).unique().numel() > 1
    soft = policy.model(**batch).logits
    worst = 0.0
    for row, logits in zip(rows, soft, strict=True):
        expected = base(torch.tensor([policy.prefix.token_ids + row])).logits[0, -len(row) :]
        worst = max(worst, ((logits[: len(row)] - expected).abs().max() / expected.abs().max()).item())
    return worst


@pytest.mark.parametrize("settings", [NF4, NESTED, {"load_in_4bit": True}], ids=["nf4", "nested", "fp4"])
def test_it_equals_the_hard_prompt_on_the_quantised_base(folder, settings):
    policy = quantised_policy(folder, settings)
    assert policy.prefix.quantization == settings
    assert soft_prefix(policy.model).dtype == torch.float32
    assert largest_difference(policy, dequantised(folder, settings)) < 1e-5
    assert largest_difference(policy, AutoModelForCausalLM.from_pretrained(folder)) > 0.02


def gradient(policy):
    """Of the prefix, by a loss on what is scored."""
    soft_prefix(policy.model).grad = None
    ids = torch.tensor(policy.encode([sample_context(0)], 1))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    logps, _ = policy.module(ids, torch.ones_like(ids), scored)
    logps.sum().backward()
    return soft_prefix(policy.model).grad


@pytest.mark.parametrize("order", [(), ("eval",), ("train",), ("eval", "train"), ("train", "eval")], ids=str)
def test_the_gradient_is_there_in_any_order(folder, order):
    """And equals the one through float weights; in between the policy answers."""
    policy = quantised_policy(folder)
    for mode in order:
        getattr(policy.model, mode)()
        policy.generate(["hello"], max_completion_length=2)
    expected = gradient(PrefixTuningPolicyModel.from_hard_prompt(dequantised(folder), HARD_PROMPT))
    assert expected.norm() > 0.1
    assert (gradient(policy) - expected).norm() < 1e-4 * expected.norm()
    assert policy.difference_to_hard_prompt() < 1e-6


def test_a_loaded_base_and_one_saved_in_4_bits(folder, tmp_path):
    """Both make the same prefix. What is saved in 4 bits says so itself; its layers compute in the policy's dtype."""
    settings = {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}
    loaded = plain(folder, settings)
    loaded.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = PrefixTuningPolicyModel.from_hard_prompt(str(tmp_path / "saved"), HARD_PROMPT)
    assert saved.prefix.quantization is None
    assert torch.equal(soft_prefix(saved.model), soft_prefix(quantised_policy(folder).model))
    policy = PrefixTuningPolicyModel.from_hard_prompt(plain(folder), HARD_PROMPT)
    assert policy.prefix.quantization == NF4
    assert torch.equal(soft_prefix(policy.model), soft_prefix(saved.model))
    assert gradient(policy).any() and torch.equal(gradient(saved), gradient(policy))
    # A loaded one's layers keep what they compute in.
    PrefixTuningPolicyModel.from_hard_prompt(loaded, HARD_PROMPT)
    assert {m.compute_dtype for m in loaded.modules() if isinstance(m, Linear4bit)} == {torch.bfloat16}
    with pytest.raises(InputError, match="saved in 4 bits already: leave load_in_4bit or quantization_config out"):
        quantised_policy(str(tmp_path / "saved"))


# Saved and trained


def test_the_adapter_brings_its_quantisation(folder, adapter):
    policy, made = PrefixTuningPolicyModel.from_pretrained(adapter), quantised_policy(folder)
    assert policy.prefix.quantization == NF4 and policy.model.get_base_model().is_loaded_in_4bit
    assert torch.equal(soft_prefix(policy.model), soft_prefix(made.model))
    assert policy.difference_to_hard_prompt() < 1e-6


def test_the_cards_example_answers_as_the_hard_prompt(folder, tmp_path):
    """Plain PEFT on the base in 4 bits, as plain transformers answers on it."""
    base = shutil.copytree(folder, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    for name in ("top_k", "top_p"):
        del settings[name]
    settings |= {"do_sample": False, "max_new_tokens": 24}
    (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    quantised_policy(str(base)).save_pretrained(tmp_path / "kind")
    (answered,) = run_example(tmp_path / "kind")
    *messages, reply = answered["generated_text"]
    chat = [{"role": "system", "content": HARD_PROMPT}, *messages]

    def hard(model):
        chats = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base))
        return chats(chat)[0]["generated_text"][-1]

    assert reply == hard(plain(base)) != hard(AutoModelForCausalLM.from_pretrained(base))


@pytest.fixture
def build(folder, tmp_path):
    def make(name="run", **settings):
        return SingleStepPPOTrainer(
            model=quantised_policy(folder),
            reward_funcs=varied,
            args=SingleStepPPOConfig(output_dir=str(tmp_path / name), **SMALL_AND_QUIET | settings),
            train_dataset=contexts_of(range(12)),
        )

    return make


def test_ppo_begins_at_the_hard_prompt_and_resumes_to_the_same_bytes(build):
    saving = {"save_strategy": "steps", "save_steps": 1}
    build("again", max_steps=1, **saving).train()
    whole, again = build("whole", **saving), build("again", **saving)
    start = prefix_of(whole).clone()
    whole.train()
    assert logged(whole, "policy/ratio")[0] == pytest.approx(1, abs=1e-5)
    assert logged(whole, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert min(logged(whole, "grad_norm")) > 0 and not torch.equal(prefix_of(whole), start)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert torch.equal(saved_prefix(root_of(again)), saved_prefix(root_of(whole)))


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on a CPU with bfloat16 instructions only")
def test_weights_that_were_packed_stop_a_run_and_are_not_taken(build, folder):
    trainer = build()
    for layer in trainer.policy.model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = True  # as bitsandbytes makes it
    with pytest.raises(RunError, match="the prefix has no gradient at the first update"):
        trainer.train()
    base = plain(folder).eval()
    with torch.no_grad():
        base(torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="packed its weights for inference on the CPU: load it again"):
        PrefixTuningPolicyModel.from_hard_prompt(base, HARD_PROMPT)


def test_a_model_that_is_not_quantised_is_left_as_it_is(base):
    before = dict(vars(base))
    assert keep_trainable(base, torch.bfloat16) is base and vars(base) == before


def test_recipes_on_a_base_in_4_bits(
    recipes, folder, contexts_file, reward_adapter, write_recipe_of, tmp_path, monkeypatch
):
    """What is converted in 4 bits is answered with, trained and compared in them, with no flag."""
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        asked.append(kwargs.get("quantization_config"))
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    named = {"model_name_or_path": folder, "load_in_4bit": True, "use_bnb_nested_quant": True}
    few = {
        "run_name": "trained",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "eval_steps": 1,
    }
    made = {"model_name_or_path": ..., "hard_prompt": ..., "prefix_adapter": str(tmp_path / "outputs" / "made")}
    trained = {"policy_adapter": str(tmp_path / "outputs" / "trained")}
    for name, sections in (
        ("convert_prompt", {"model": named, "task": {"run_name": "made"}}),
        ("train_policy", {"model": made, "task": few}),
        ("generate", {"model": trained}),
        ("compare", {"model": trained, "task": {"best_of_n": 0}}),
    ):
        recipes[name].main(["--config", str(write_recipe_of(name, **sections))])
        assert len(asked) == 1, name
        assert quantization_settings(asked.pop()) == NESTED, name
    assert ChatPrefix.load(tmp_path / "outputs" / "trained").quantization == NESTED


# What is refused, before anything loads


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(h2s.quantization, "is_bitsandbytes_available", lambda: False)


def test_a_package_that_is_not_there(folder, adapter, not_installed, no_model):
    for make in (
        lambda: quantised_policy(folder),
        lambda: PrefixTuningPolicyModel.from_pretrained(adapter),
        lambda: open_hard_prompt(folder, HARD_PROMPT).with_quantization(BitsAndBytesConfig(**NF4)),
    ):
        with pytest.raises(InputError, match=r"bitsandbytes.* is not installed: pip install -e \"\.\[quantized\]\""):
            make()


def test_recipes_refuse_before_a_folder_is_made(refused, adapter, not_installed):
    of_adapter = {"model_name_or_path": ..., "hard_prompt": ..., "prefix_adapter": str(adapter)}
    assert "is not installed" in refused("convert_prompt", model={"load_in_4bit": True})
    assert "is not installed" in refused("train_policy", model=of_adapter)
    assert "is not installed" in refused("generate", model={"policy_adapter": str(adapter)})
    line = refused("train_policy", model={**of_adapter, "load_in_4bit": True})
    assert line == "error: prefix_adapter brings its own load_in_4bit: leave load_in_4bit out"


def test_fsdp2_is_refused(folder, no_model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"FSDP2 was not run with a base in 4 bits: launch with .*multi_gpu\.yaml"):
        quantised_policy(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_8bit": True}, "bitsandbytes in 8 bits was not run with a prefix: expected bitsandbytes in 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq was not run with a prefix"),
        ({"quant_method": "awq"}, "quantised by awq was not run"),
        ({}, "quantised by no method was not run"),
        ({**NF4, "bnb_4bit_compute_dtype": "int99"}, "the quantisation cannot be read: .*int99"),
        ({**NF4, "bnb_4bit_quant_type": 4}, "the quantisation cannot be read: bnb_4bit_quant_type must be a string"),
    ],
)
def test_what_was_not_run(folder, settings, words, tmp_path, no_model):
    """As a base's own configuration, as an adapter's and as it is asked for."""
    with pytest.raises(InputError, match=words):
        quantization_settings(settings)
    with pytest.raises(InputError, match=words):
        check_quantization(PretrainedConfig(quantization_config=settings), None)
    with pytest.raises(InputError, match=words):
        check_quantization(PretrainedConfig(), settings)
    base = shutil.copytree(folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        open_hard_prompt(str(base), HARD_PROMPT)


def test_a_configuration_for_a_model_that_is_loaded(base):
    with pytest.raises(InputError, match="quantization_config is for a name: a loaded model is quantised as it was"):
        PrefixTuningPolicyModel.from_hard_prompt(base, HARD_PROMPT, quantization_config=BitsAndBytesConfig(**NF4))


def test_an_adapter_whose_quantisation_is_damaged(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    told = json.loads((copy / "h2s.json").read_text(encoding="utf-8"))
    (copy / "h2s.json").write_text(json.dumps({**told, "quantization": "nf4"}), encoding="utf-8")
    with pytest.raises(InputError, match="does not describe a policy adapter"):
        PrefixTuningPolicyModel.open(copy)
