"""The real embedded models: run by `python -m pytest -m embedded` (some minutes)."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from tiny import ROOT
from transformers import BitsAndBytesConfig

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer, load_contexts
from h2s.models import load_base_model, load_tokenizer, resolve_embedded
from h2s.prefix.chat_template import ChatPrefix
from h2s.prefix.generation import Batch, Sampling

pytestmark = pytest.mark.embedded
SMOLLM2 = "smollm2-135m-instruct"
SENTENCE = "You are a friendly person who likes to ask short questions about what people did today. "
CONTEXTS = [
    [{"role": "user", "content": "I went hiking today."}],
    [{"role": "user", "content": "今天天氣很好，我去公園散步，還遇到了老朋友。"}],
    [
        {"role": "user", "content": "I cooked a large pot of soup for all of my neighbours."},
        {"role": "assistant", "content": "That is kind."},
        {"role": "user", "content": "They liked it!"},
    ],
]
PLAIN_PEFT = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

adapter, base_folder, opening, conversation = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(adapter), AutoTokenizer.from_pretrained(adapter)
base, stock = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")["input_ids"]
whole = stock.apply_chat_template(opening + conversation, add_generation_prompt=True, return_tensors="pt")["input_ids"]
with torch.no_grad():
    soft, hard = model(ids).logits[0], base(whole).logits[0, -ids.shape[1]:]
said = pipeline("text-generation", model=model, tokenizer=tokenizer)(
    conversation, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
expected = pipeline("text-generation", model=base, tokenizer=stock)(
    opening + conversation, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
print("RESULT", json.dumps({"difference": (soft - hard).abs().max().item(), "said": said, "expected": expected,
                            "h2s": "h2s" in sys.modules, "prefix": whole.shape[1] - ids.shape[1]}))
"""


def run(recipe, *argv):
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in argv])


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """conftest gives the tiny models one thread; these gain by two."""
    torch.set_num_threads(os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("sentences", "opening"), [(6, None), (34, None), (6, "start")], ids=["100", "over 512", "opening"]
)
def test_converted_prompt_is_the_hard_prompt_for_plain_peft(sentences, opening, tmp_path):
    flags = [] if opening is None else ["--opening_user_message", opening]
    run("convert_prompt", "--model_name_or_path", "embedded:gemma-3-270m", "--hard_prompt", SENTENCE * sentences,
        "--output_dir", tmp_path, "--run_name", "p", *flags)  # fmt: skip
    prefix = ChatPrefix.load(tmp_path / "p")
    conversation = CONTEXTS[0] if opening is None else [{"role": "assistant", "content": "How are you?"}, *CONTEXTS[0]]
    arguments = [tmp_path / "p", resolve_embedded("embedded:gemma-3-270m"), prefix.opening_messages, conversation]
    arguments = [json.dumps(a) if isinstance(a, list) else str(a) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.split("RESULT", 1)[1])
    assert not result["h2s"]
    assert result["prefix"] == len(prefix.token_ids) and (result["prefix"] > 512) == (sentences == 34)
    assert result["difference"] < 1e-3
    assert result["said"] == result["expected"]


def test_checkpoint_of_the_prototype(tmp_path):
    """Gemma's own embeddings, sqrt(640) times the table's rows, moved as training might: the recipe measures itself."""
    source = resolve_embedded("embedded:gemma-3-270m")
    with safe_open(Path(source) / "model.safetensors", "pt") as weights:
        ids = load_tokenizer(source)(SENTENCE * 6, add_special_tokens=False).input_ids
        embeddings = weights.get_tensor("model.embed_tokens.weight")[ids] * 640**0.5
    for moved, name in ((0, "untrained"), (0.1, "trained")):
        soft = embeddings + moved * embeddings.std() * torch.randn(embeddings.shape)
        content = {"prefix_embeddings_state_dict": soft, "prefix_ids": torch.tensor([ids])}
        torch.save(content, tmp_path / "old.pth")
        run("convert_prompt", "--model_name_or_path", "embedded:gemma-3-270m", "--legacy_checkpoint",
            tmp_path / "old.pth", "--output_dir", tmp_path, "--run_name", name)  # fmt: skip
        to_hard = re.search(
            r"hard prompt: float32 (\S+)\.", (tmp_path / name / "README.md").read_text(encoding="utf-8")
        )
        assert (float(to_hard[1]) > 1e-3) == (moved > 0)
        assert len(ChatPrefix.load(tmp_path / name).token_ids) > len(ids)


def test_first_pass_ratio_is_one_and_replies_end():
    policy = PrefixTuningPolicyModel.from_hard_prompt("embedded:gemma-3-270m", SENTENCE, dtype="float32")
    assert policy.difference_to_hard_prompt() < 1e-4
    policy.add_hard_prompt()
    prompts = policy.encode(CONTEXTS, 40)
    torch.manual_seed(0)
    completions = policy.complete(prompts, Sampling(40))
    assert sum(c[-1] in policy.stop_ids for c in completions) >= 2  # the newline ends a turn of the transcript
    batch = Batch.from_rows(policy.tokenizer, prompts, completions, policy.model.device)
    with torch.no_grad():
        logps = policy.module(*batch)[0]  # ragged and padded
        with policy.hard_prompt_active():
            ref_logps = policy.module(*batch)[0]
        alone = [policy.module(*batch.rows(torch.tensor([row])))[0].sum() for row in range(len(prompts))]
    assert (logps.sum(1) - torch.stack(alone)).exp().sub(1).abs().max() < 1e-4
    assert (logps - ref_logps).abs().max() < 1e-3


def test_a_base_in_4_bits(tmp_path):
    """Equal to the hard prompt on the same quantised weights, which are an eighth of float32's; and PPO moves it."""
    policies = [
        PrefixTuningPolicyModel.from_hard_prompt(
            "embedded:gemma-3-270m", SENTENCE, dtype="float32", quantization_config=config
        )
        for config in (None, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    ]
    differences = [policy.difference_to_hard_prompt() for policy in policies]
    print(f"prefix minus hard prompt, of the largest logit, in float32 and in 4 bits: {differences}")
    assert max(differences) < 1e-5
    layers, whole = zip(*(megabytes(policy.model.get_base_model()) for policy in policies), strict=True)
    print(f"MB in float32, in 4 bits: layers {layers}, with the embeddings {whole}")
    assert layers[1] < layers[0] / 7 and whole[1] < whole[0]
    trainer = SingleStepPPOTrainer(
        model=policies[1],
        reward_funcs=lambda completions, **kwargs: [float(len(c[0]["content"])) for c in completions],
        args=SingleStepPPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            per_device_train_batch_size=4,
            max_completion_length=8,
            num_ppo_epochs=1,
            num_mini_batches=1,
            value_warmup_batches=0,
            scale_rewards=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_contexts(str(ROOT / "recipes" / "sample_data" / "contexts.json")),
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert abs(line["policy/ratio"] - 1) < 1e-4 and line["grad_norm"] > 0 and abs(line["kl"]) < 1e-2


def megabytes(model):
    """Of its linear layers but the head, and of all its parameters."""
    sizes = {name: p.numel() * p.element_size() / 1e6 for name, p in model.named_parameters()}
    return sum(size for name, size in sizes.items() if "_proj" in name), sum(sizes.values())


def test_reward_learns_the_sample_sheet_and_policy_runs_on_it(tmp_path):
    run("train_reward", "--config", ROOT / "recipes" / "embedded" / "reward.yaml", "--output_dir", tmp_path,
        "--run_name", "r", "--report_to", "none")  # fmt: skip
    for role in ("r", "r/judge"):  # the two were trained on other conversations, and both find the rule
        pairs = pd.read_parquet(tmp_path / role / "pairs.parquet")
        assert len(pairs) >= 80 and (pairs["margin"] > 0).mean() >= 0.9
    run("train_policy", "--config", ROOT / "recipes" / "embedded" / "policy.yaml", "--reward_adapter", tmp_path / "r",
        "--judge_adapter", tmp_path / "r" / "judge", "--test_size", 0.05, "--max_steps", 1,
        "--per_device_train_batch_size", 4, "--max_completion_length", 8, "--output_dir", tmp_path, "--run_name", "p",
        "--report_to", "none", "--value_warmup_batches", 0, "--scale_rewards", "false")  # fmt: skip
    (line,) = [r for r in json.loads((tmp_path / "p" / "trainer_state.json").read_text())["log_history"] if "loss" in r]
    assert abs(line["policy/ratio"] - 1) < 1e-4 and line["grad_norm"] > 0 and abs(line["kl"]) < 1e-2
    run("train_dpo", "--config", ROOT / "recipes" / "embedded" / "dpo.yaml",
        "--judge_adapter", tmp_path / "r" / "judge", "--max_steps", 2, "--logging_steps", 1,
        "--max_completion_length", 8, "--output_dir", tmp_path, "--run_name", "d", "--report_to", "none")  # fmt: skip
    lines = json.loads((tmp_path / "d" / "trainer_state.json").read_text())["log_history"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and lines[0]["grad_norm"] > 0
    assert next(r["eval_loss"] for r in lines if "eval_loss" in r) < math.log(2)
    assert (tmp_path / "d" / "accuracy.md").is_file()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The five recipes by the YAMLs in recipes/, on a part of their data: the folder of their runs."""
    out, yamls, data = tmp_path_factory.mktemp("smollm2"), ROOT / "recipes" / SMOLLM2, ROOT / "recipes" / "sample_data"
    pd.read_excel(data / "judgements.xlsx").head(64).to_excel(out / "sheet.xlsx", index=False)
    items = json.loads((data / "more_contexts.json").read_text(encoding="utf-8"))[:16]
    (out / "contexts.json").write_text(json.dumps(items), encoding="utf-8")
    rewards = ["--reward_adapter", out / "reward", "--judge_adapter", out / "reward" / "judge"]
    quiet, short = ["--report_to", "none", "--max_steps", 1], ["--max_completion_length", 12]
    for recipe, name, flags in (
        ("convert_prompt", "convert", []),
        ("train_reward", "reward", [*quiet, "--path", out / "sheet.xlsx"]),
        ("train_policy", "policy", [*rewards, *quiet, *short, "--path", out / "contexts.json", "--scale_rewards",
                                    "false", "--per_device_train_batch_size", 4, "--value_warmup_batches", 0]),
        ("compare", "compare", [*rewards, *short, "--path", out / "contexts.json", "--policy_adapter", out / "policy"]),
    ):  # fmt: skip
        run(recipe, "--config", yamls / f"{name}.yaml", "--output_dir", out, "--run_name", name, *flags)
    return out


def test_an_instruct_model_runs_the_five_recipes(smollm2, capsys):
    lines = json.loads((smollm2 / "policy" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    (line,) = [r for r in lines if "loss" in r]
    assert abs(line["policy/ratio"] - 1) < 1e-4 and line["grad_norm"] > 0 and abs(line["kl"]) < 1e-2
    assert list((smollm2 / "compare").glob("*.xlsx"))
    capsys.readouterr()
    run("generate", "--policy_adapter", smollm2 / "policy", "--conversation", "What is 12 times 3?",
        "--max_completion_length", 24, "--temperature", 0)  # fmt: skip
    assert capsys.readouterr().out.strip()


def test_an_instruct_model_ends_its_turns_and_reads_its_own_template(smollm2):
    policy = PrefixTuningPolicyModel.from_pretrained(smollm2 / "convert")
    assert policy.difference_to_hard_prompt() < 1e-4
    assert policy.stop_ids == policy.tokenizer.convert_tokens_to_ids(["<|im_end|>"]) == [2]
    prompts = policy.encode(CONTEXTS, 48)
    # ChatML; the system message that the template has for conversations without one never comes.
    for prompt, context in zip(prompts, CONTEXTS, strict=True):
        turns = [{"role": "system", "content": policy.prefix.hard_prompt}, *context, {"role": "assistant"}]
        expected = "".join(f"<|im_start|>{t['role']}\n" + f"{t.get('content')}<|im_end|>\n" for t in turns)
        whole = policy.tokenizer.decode(policy.prefix.token_ids + prompt)
        assert whole == expected.removesuffix("None<|im_end|>\n")
    completions = policy.complete(prompts, Sampling(48, temperature=0))
    assert sum(c[-1] == 2 for c in completions) >= 2
    base = load_base_model(resolve_embedded(f"embedded:{SMOLLM2}"), dtype="float32")
    for prompt, completion in zip(prompts, completions, strict=True):  # each as it is answered alone, as text
        ids = policy.prefix.token_ids + prompt + completion
        with torch.no_grad():
            logits = base(torch.tensor([ids])).logits[0, -len(completion) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
