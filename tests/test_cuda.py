"""On a CUDA card: `python -m pytest -m cuda -s` prints the figures.

True shapes of Gemma 3 1B and bert-base-chinese, random weights made on the spot, no network. Needs a torch built for
CUDA beside what `pyproject.toml` asks for, 24 GB on the card and 5 GB of disk.
"""

import time

import pytest
import torch
from datasets import Dataset
from distributed.launching import launch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from tiny import HARD_PROMPT, build_tokenizer, save_bert
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, Gemma3ForCausalLM
from transformers import Gemma3TextConfig as Gemma

from h2s import (
    PrefixTuningPolicyModel,
    RewardModelConfig,
    RewardModelTrainer,
    SingleStepPPOConfig,
    SingleStepPPOTrainer,
    load_preferences,
)
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Sampling, generate, seeded

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")]
GEMMA_3_1B = {
    "vocab_size": 262_144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
}
BERT_BASE_CHINESE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
REPLY = 128


def length(completions, **kwargs):
    """A reward that no reply repeats: of its characters."""
    return [float(sum(map(ord, c[0]["content"])) % 101) for c in completions]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The folder of a 1B model in bfloat16: 2 GB."""
    folder = tmp_path_factory.mktemp("gemma-3-1b")
    torch.manual_seed(0)
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(GEMMA_3_1B["num_hidden_layers"])]
    model = Gemma3ForCausalLM(Gemma(**GEMMA_3_1B, layer_types=kinds, pad_token_id=0, eos_token_id=1, bos_token_id=2))
    model.generation_config.update(eos_token_id=[1, 5], pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def build(gemma, tmp_path):
    def make(folder="run", **given):
        prompts = Dataset.from_dict({"prompt": [f"{'walk ' * (1 + i % 7)}number {i}" for i in range(32)]})
        settings = {
            "per_device_train_batch_size": 16,
            "max_completion_length": REPLY,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return SingleStepPPOTrainer(
            model=PrefixTuningPolicyModel.from_hard_prompt(str(gemma), HARD_PROMPT),
            reward_funcs=length,
            args=SingleStepPPOConfig(output_dir=str(tmp_path / folder), **settings | given),
            train_dataset=prompts,
        )

    return make


def test_a_conversion_is_the_hard_prompt(gemma):
    differences = {}
    for dtype in ("float32", "bfloat16"):
        policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma), HARD_PROMPT, dtype=dtype)
        assert policy.model.device.type == "cuda" and soft_prefix(policy.model).dtype == torch.float32
        differences[dtype] = policy.difference_to_hard_prompt()
    print(f"\nconversion, largest difference of a logit over the largest logit: {differences}")
    assert differences["float32"] < 1e-4 and differences["bfloat16"] < 0.1


def test_a_batch_past_the_window_is_exact(gemma):
    """In float32, beside the unpadded forward of prefix and row as text."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma), HARD_PROMPT, dtype="float32")
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 320, (n,), generator=draw).tolist() for n in (700, 40, 520, 3)]
    with seeded(policy.model.device, 0):
        replies, _, (logps, _) = generate(policy.model, policy.tokenizer, prompts, Sampling(16), [1])
    base, worst = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval().to(policy.model.device), 0.0
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids = torch.tensor([policy.prefix.token_ids + prompt + reply], device=base.device)
        with torch.no_grad():
            lines = base(ids, logits_to_keep=len(reply) + 1).logits[0, :-1].log_softmax(-1)
        own = lines.gather(1, torch.tensor(reply, device=base.device)[:, None])[:, 0]
        worst = max(worst, (logps[row, : len(reply)] - own).abs().max().item())
    print(f"\npast the window, largest difference of a log-probability: {worst:.2g}")
    assert worst < 1e-3


def test_a_static_cache_draws_the_same(gemma):
    """In float32: transformers compiles the decode step with it."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma), HARD_PROMPT, dtype="float32")
    contexts = [[{"role": "user", "content": text}] for text in ("walk", "the number is " * 20, "hello")]
    prompts, drawn, seconds = policy.encode(contexts, REPLY), {}, {}
    for cache in (None, "static", None, "static"):  # warm the second time, and compiled
        begin = time.perf_counter()
        with torch.no_grad(), seeded(policy.model.device, 0):
            drawn[cache] = policy.complete(prompts, Sampling(REPLY, cache_implementation=cache))
        seconds[cache] = time.perf_counter() - begin
    print(f"\nstatic cache, seconds for {REPLY} tokens: {seconds}")
    assert drawn["static"] == drawn[None]


@pytest.mark.parametrize("updates", [1, 4])
def test_an_iteration(build, updates):
    """In bfloat16, 16 replies of 128 tokens: the ratio is 1 before the first update."""
    trainer = build(max_steps=2, num_mini_batches=updates, ratio_norm="mean")
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trainer.train()
    seconds, gigabytes = time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**30
    first, second = (line for line in trainer.state.log_history if "reward" in line)
    print(f"\n{updates} updates: {seconds:.1f} s for two iterations and the warm-up, {gigabytes:.1f} GB at the peak")
    assert first["completions/mean_length"] > REPLY / 2 and abs(first["kl"]) < 1e-6
    assert first["policy/ratio"] == second["policy/ratio"] == 1 and second["kl"] != 0


def test_a_resumed_run_ends_in_the_same_bytes(build):
    ends = {}
    for folder, parts in (("straight", [3]), ("resumed", [2, 3])):
        for steps in parts:
            trainer = build(folder, max_steps=steps, save_strategy="steps", save_steps=1, full_determinism=True)
            trainer.train(resume_from_checkpoint=steps == 3 and len(parts) == 2)
        ends[folder] = soft_prefix(trainer.policy.model).detach().cpu()
    assert torch.equal(*ends.values())


def test_an_epoch_of_the_reward_model(sheet_file, tmp_path):
    folder = save_bert(tmp_path / "bert")  # its tokenizer
    config = BertConfig(vocab_size=21_128, num_labels=1, max_position_embeddings=512, **BERT_BASE_CHINESE)
    BertForSequenceClassification(config).save_pretrained(folder)
    judged = load_preferences(str(sheet_file))
    torch.cuda.reset_peak_memory_stats()
    trainer = RewardModelTrainer(
        model=str(folder),
        args=RewardModelConfig(
            output_dir=str(tmp_path / "run"), num_train_epochs=1, save_strategy="no", report_to="none"
        ),
        train_dataset=judged,
    )
    assert trainer.args.bf16
    begin = time.perf_counter()
    output = trainer.train()  # ends the run itself where the prefix has no gradient
    gigabytes = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"\nreward, {len(judged)} pairs: {time.perf_counter() - begin:.1f} s an epoch, {gigabytes:.1f} GB at the peak"
    )
    assert output.training_loss > 0


QUIET = ["--report_to", "none", "--disable_tqdm", "true"]


def test_stage_1_as_configured(bert_folder, sheet_file, tmp_path):
    command = ["recipes/train_reward.py", "--reward_model_name_or_path", str(bert_folder), "--path", str(sheet_file)]
    command += ["--num_train_epochs", "1", "--output_dir", str(tmp_path), "--run_name", "run", *QUIET]
    done = launch(1, *command, config="single_gpu")
    assert done.returncode == 0, done.stderr[-8000:]
    AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)


@pytest.mark.parametrize("config", ["single_gpu", "multi_gpu", "fsdp2"])
def test_stage_2_as_configured(config, gemma_folder, contexts_file, tmp_path):
    """One process, on the card, in bfloat16."""
    command = ["recipes/train_policy.py", "--model_name_or_path", str(gemma_folder), "--path", str(contexts_file)]
    command += ["--hard_prompt", HARD_PROMPT, "--reward_function", "rewards_of_launches.length", "--max_steps", "2"]
    command += ["--max_completion_length", "4", "--output_dir", str(tmp_path), "--run_name", "run", *QUIET]
    done = launch(1, *command, config=config)
    assert done.returncode == 0, done.stderr[-8000:]
    assert "step 2 of 2: " in done.stdout
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
