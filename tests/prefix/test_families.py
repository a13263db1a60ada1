"""Each family from conversion to plain PEFT, row by row beside the hard prompt as text; what is refused, and why."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, MISTRAL_01_TEMPLATE, MISTRAL_03_TEMPLATE, SIZES, save_family
from ppo.runs import logged, varied
from safetensors.torch import load_file
from tiny import HARD_PROMPT, WINDOW
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from h2s import InputError, PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.prefix.adapter import prefix_from_hard_prompt, soft_prefix
from h2s.prefix.families import SHOWN, check_family
from h2s.prefix.generation import Batch, Sampling, completion_logps, generate

NEW = 10
SAID = [
    ["hi"],
    ["I went for a walk.", "How was it?", "I like tea and long books."],
    ["你好，今天天氣如何？"],
    ["what did you do? " * 8],
    ["hello there", "hello", "I ran.", "and you?", "I like long books."],
]
CONTEXTS = [[{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)] for turns in SAID]
# A process without h2s: the logits of each adapter after the prompt that its tokenizer makes of a conversation.
PLAIN_PEFT = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoTokenizer

out, conversation, logits = sys.argv[1], json.loads(sys.argv[2]), {}
for folder in sys.argv[3:]:
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits[folder] = model(ids).logits[0]
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    logits[folder + " generated"] = generated[0, ids.shape[1]:]
assert "h2s" not in sys.modules
save_file(logits, out)
"""


@dataclass
class Shown:
    """A family's policy, and the same model as transformers loads it: the independent path."""

    name: str
    policy: PrefixTuningPolicyModel
    base: torch.nn.Module
    tokenizer: object
    converted: str

    def whole(self, context):
        """Token ids of hard prompt and conversation as text."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "system", "content": HARD_PROMPT}, *context],
            tokenize=False, add_generation_prompt=True, **FAMILIES[self.name].settings,
        )  # fmt: skip
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logits(self, ids, last):
        """Of the last `last` positions, unpadded."""
        return self.base(torch.tensor([ids])).logits[0, -last:]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}
    for name, family in FAMILIES.items():
        folder = save_family(name, tmp_path_factory.mktemp("families") / name)
        policy = PrefixTuningPolicyModel.from_hard_prompt(
            str(folder), HARD_PROMPT, chat_template_kwargs=family.settings, dtype="float32"
        )
        policy.save_pretrained(folder.parent / "converted")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        stock = AutoTokenizer.from_pretrained(folder)
        made[name] = Shown(name, policy, base, stock, str(folder.parent / "converted"))
    return made


@pytest.fixture(params=FAMILIES)
def family(families, request) -> Shown:
    return families[request.param]


def test_those_that_are_said_to_be_shown_are(families):
    types = {AutoConfig.from_pretrained(f.policy.model.peft_config["default"].base_model_name_or_path).model_type
             for f in families.values()}  # fmt: skip
    assert types == set(SHOWN) == set(FAMILIES)
    lengths = [len(f.whole(CONTEXTS[3])) for f in families.values()]
    assert min(lengths) > 2 * WINDOW


@torch.no_grad()
def test_the_converted_prefix_is_the_hard_prompt(family):
    assert family.policy.difference_to_hard_prompt() < 1e-4
    for context, prompt in zip(CONTEXTS, family.policy.encode(CONTEXTS, NEW), strict=True):
        assert family.policy.prefix.token_ids + prompt == family.whole(context)
        expected = family.logits(family.whole(context), len(prompt))
        soft = family.policy.model(torch.tensor([prompt])).logits[0]
        assert (soft - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_ragged_batch_is_answered_as_text_is(family):
    """Greedy, argmax by argmax with neither cache nor `generate`, past the window."""
    completions = family.policy.complete(family.policy.encode(CONTEXTS, NEW), Sampling(NEW, temperature=0))
    for context, completion in zip(CONTEXTS, completions, strict=True):
        expected = []
        while len(expected) < NEW and not set(expected) & set(family.policy.stop_ids):
            expected.append(int(family.logits(family.whole(context) + expected, 1)[0].argmax()))
        assert completion == expected
    assert len({tuple(c) for c in completions}) == len(CONTEXTS)


def test_log_probabilities_of_what_is_sampled_are_those_of_the_text(family):
    prompts = family.policy.encode(CONTEXTS, 3 * NEW)
    torch.manual_seed(0)
    completions = family.policy.complete(prompts, Sampling(3 * NEW))
    batch = Batch.from_rows(family.policy.tokenizer, prompts, completions, torch.device("cpu"))
    with torch.no_grad():
        logps, entropy = family.policy.module(*batch)
    for row, (context, completion) in enumerate(zip(CONTEXTS, completions, strict=True)):
        lines = family.logits(family.whole(context) + completion, len(completion) + 1)[:-1].log_softmax(-1)
        expected = lines.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        mask = batch.completion_mask[row]
        torch.testing.assert_close(logps[row, mask], expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(entropy[row, mask], -(lines.exp() * lines).sum(-1), rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def trained(families, tmp_path_factory):
    """One PPO iteration each, from the saved adapter, saved again: the trainer, and the adapter's folder."""
    made = {}
    for name, family in families.items():
        out = tmp_path_factory.mktemp("trained") / name
        args = SingleStepPPOConfig(
            output_dir=str(out), max_steps=1, max_completion_length=6, per_device_train_batch_size=len(CONTEXTS),
            save_strategy="no", report_to="none", disable_tqdm=True, num_mini_batches=1, num_ppo_epochs=2,
            target_kl=None, scale_rewards=False, value_warmup_batches=0,
        )  # fmt: skip
        trainer = SingleStepPPOTrainer(
            model=family.converted,
            reward_funcs=varied,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": CONTEXTS}),
        )
        trainer.train()
        trainer.policy.save_pretrained(out / "adapter")
        made[name] = trainer, str(out / "adapter")
    return made


def test_the_first_iteration_begins_at_the_hard_prompt_and_moves_the_prefix(family, trained):
    trainer, _ = trained[family.name]
    assert logged(trainer, "policy/ratio") == pytest.approx([1], abs=1e-4)
    assert logged(trainer, "kl") == pytest.approx([0], abs=1e-3)
    (norm,) = logged(trainer, "grad_norm")
    assert 0 < norm < float("inf")
    moved = soft_prefix(trainer.policy.model) - soft_prefix(family.policy.model)
    layers = trainer.policy.model.peft_config["default"].num_layers
    by_layer = moved.detach().view(len(moved), 2 * layers, -1).abs().amax((0, 2))
    assert (by_layer > 0).all() and by_layer.isfinite().all()


def test_plain_peft_loads_what_was_converted_and_what_was_trained(families, trained, tmp_path):
    folders = [f for name in FAMILIES for f in (families[name].converted, trained[name][1])]
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "logits"), json.dumps(CONTEXTS[3]), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "logits")
    for name, family in families.items():
        whole = family.whole(CONTEXTS[3])
        expected = family.logits(whole, len(whole) - len(family.policy.prefix.token_ids))
        assert (found[family.converted] - expected).abs().max() < 1e-4 * expected.abs().max(), name
        said = []
        while len(said) < 4 and not set(said) & set(family.policy.stop_ids):
            said.append(int(family.logits(whole + said, 1)[0].argmax()))
        assert found[family.converted + " generated"].tolist() == said, name
        trainer, folder = trained[name]
        (prompt,) = trainer.policy.encode([CONTEXTS[3]], 1)
        with torch.no_grad():
            soft = trainer.policy.model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(found[folder], soft, rtol=0, atol=1e-4 * soft.abs().max().item())
        assert (soft - expected).abs().max() > 1e-3, name


# Chat templates


def convert(folder, **settings):
    return PrefixTuningPolicyModel.from_hard_prompt(str(folder), HARD_PROMPT, dtype="float32", **settings)


def test_llamas_template_prints_the_day_unless_it_is_given_one(families, no_model):
    folder = families["llama"].base.name_or_path
    with pytest.raises(InputError, match=r"prints the date.* chat_template_kwargs \(date_string"):
        convert(folder)
    assert "Today Date: 26 Jul 2024" in families["llama"].policy.prefix.text


def test_qwens_setting_stands_in_every_prompt(families):
    qwen = families["qwen3"].policy
    assert all(qwen.tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n") for ids in qwen.encode(CONTEXTS, 1))
    thinking = convert(families["qwen3"].base.name_or_path)
    assert not any("<think>" in thinking.tokenizer.decode(ids) for ids in thinking.encode(CONTEXTS, 1))


def test_mistrals_first_template_has_no_system_message(tmp_path, no_model):
    with pytest.raises(InputError, match="refuses the messages: Conversation roles must alternate"):
        convert(save_family("mistral", tmp_path, MISTRAL_01_TEMPLATE))


def test_mistrals_third_template_takes_one_turn_alone(tmp_path, caplog):
    """It prints the system message in the last turn: a longer conversation is refused, not garbled."""
    policy = convert(save_family("mistral", tmp_path, MISTRAL_03_TEMPLATE))
    assert "only conversations of one turn can be answered" in caplog.text
    base, stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    family = Shown("mistral", policy, base, stock, "")
    for context in (CONTEXTS[0], CONTEXTS[3]):
        (prompt,) = policy.encode([context], 1)
        assert policy.prefix.token_ids + prompt == family.whole(context)
        expected = family.logits(family.whole(context), len(prompt))
        with torch.no_grad():
            soft = policy.model(torch.tensor([prompt])).logits[0]
        assert (soft - expected).abs().max() < 1e-4 * expected.abs().max()
    for context in (CONTEXTS[1], CONTEXTS[4]):
        with pytest.raises(InputError, match=r"context 1: .* renders the system message elsewhere"):
            policy.encode([context], 1)


# Others

MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
OTHERS = {
    "gemma": {},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "gpt_oss": {**MOE, "sliding_window": 16},
    "mixtral": MOE,
    "olmo2": {},
    "phi3": {"sliding_window": 16},
    "qwen2": WINDOWED,
    "qwen3_moe": MOE,
    "smollm3": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_conversion_replies_and_log_probabilities_of_others(name, tokenizer, caplog):
    """On token ids alone, without a chat template: what README's table says of them."""
    sizes = {} if name == "gpt2" else SIZES
    base_config = AutoConfig.for_model(name, vocab_size=320, **sizes, **OTHERS[name])
    check_family(base_config)
    assert f"not on {name} models" in caplog.text
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(base_config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    prefix, *prompts = (torch.randint(6, 320, (n,), generator=draw).tolist() for n in (20, 3, 14, 5, 17))
    model = prefix_from_hard_prompt(base, prefix)
    completions = generate(model, tokenizer, prompts, Sampling(NEW, temperature=0), [1]).ids
    batch = Batch.from_rows(tokenizer, prompts, completions, torch.device("cpu"))
    logps = completion_logps(model, batch)[0]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            logits = base(torch.tensor([prefix + prompt + completion])).logits[0, -len(completion) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
        expected = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(logps[row, batch.completion_mask[row]], expected, rtol=0, atol=1e-4)
    logps.sum().backward()
    assert soft_prefix(model).grad.view(20, 8, -1).abs().amax((0, 2)).all()


REFUSED = {
    "t5": "no decoder-only language models",
    "bart": "no decoder-only language models",
    "bert": "encoders, which read a text from both sides",
    "mamba": "no place in their layers of linear_attention",
    "falcon_mamba": "no place in their layers of linear_attention",
    "jamba": "no place in their layers of linear_attention",
    "falcon_h1": "no place in their layers of hybrid",
    "qwen3_next": "no place in their layers of linear_attention",
    "qwen3_5": "no place in their layers of linear_attention",
    "nemotron_h": "no place in their layers of linear_attention, mlp, moe",
    "llama4": "no place in their layers of chunked_attention",
    "rwkv": "they keep a state",
    "deepseek_v3": "their keys are wider than their values",
    "minicpm3": "their keys are wider than their values",
    "gemma3n": "layers have keys of unlike sizes or share them",
    "gemma4": "layers have keys of unlike sizes or share them",
    "falcon": "one key for all",
    "bloom": "does not say how many tokens they take",
    "mpt": "does not say how many tokens they take",
    "cohere": r"scale their logits \(logit_scale 0.0625\)",
    "cohere2": r"scale their logits \(logit_scale 0.0625\)",
    "granite": r"scale their logits \(logits_scaling 8\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_prefix_cannot_serve_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"^{name} models cannot be used: .*{REFUSED[name]}.*; expected another chat"):
        check_family(AutoConfig.for_model(name, **({"logits_scaling": 8} if name == "granite" else {})))


def test_it_is_refused_before_weights_load(families, tmp_path, refused):
    folder = shutil.copytree(families["llama"].base.name_or_path, tmp_path / "model")
    AutoConfig.for_model("cohere", num_key_value_heads=2).save_pretrained(folder)
    line = refused("convert_prompt", model={"model_name_or_path": str(folder)})
    assert "cohere models cannot be used: they scale their logits" in line


def test_an_adapter_whose_base_was_changed_is_refused(families, tmp_path, no_model):
    """And a model that is loaded already."""
    base = families["llama"].base
    folder = shutil.copytree(base.name_or_path, tmp_path / "model")
    adapter = shutil.copytree(families["llama"].converted, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    PrefixTuningPolicyModel.open(adapter)
    for other in (AutoConfig.for_model("mamba"), AutoConfig.for_model("cohere", **SIZES)):
        other.save_pretrained(folder)
        with pytest.raises(InputError, match=f"{other.model_type} models cannot be used"):
            PrefixTuningPolicyModel.open(adapter)
    cohere = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", vocab_size=320, **SIZES))
    with pytest.raises(InputError, match="cohere models cannot be used"):
        PrefixTuningPolicyModel.from_hard_prompt(cohere, HARD_PROMPT, tokenizer=families["llama"].tokenizer)


def test_a_way_to_logits_of_its_own_is_measured(tokenizer):
    """BERT's as a decoder: the logits are equal, the log-probabilities are not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = BertLMHeadModel(BertConfig(vocab_size=320, is_decoder=True, initializer_range=0.3, **sizes))
    policy = PrefixTuningPolicyModel.from_hard_prompt(base, HARD_PROMPT, tokenizer=tokenizer)
    assert policy.difference_to_hard_prompt() > 1e-2
