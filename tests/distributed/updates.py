"""Some PPO iterations with given completions, in five ways; each writes what it ends with and who took part.

accelerate launch --config_file accelerate_configs/cpu.yaml tests/distributed/updates.py MODEL OUT BATCH CONTEXTS
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.prefix.adapter import soft_prefix


class GivenCompletions(PrefixTuningPolicyModel):
    """Replies that depend on the prompt alone, of unlike lengths, so that every launch learns from the same ones."""

    def draw(self, prompt_ids, sampling):
        self.seen.append([sum(p) for p in prompt_ids])
        completions = []
        drawn = super().draw(prompt_ids, sampling)
        for prompt in prompt_ids:
            start, length = sum(prompt), 2 + sum(prompt) % 7
            completions.append([6 + (start * 7 + 13 * i) % 250 for i in range(length)] + [5])
        return drawn._replace(ids=completions, logps_and_entropy=None)


def length_mod_5(prompts, completions, log_extra, log_metric, **kwargs):
    """What is logged of one context is logged by one process."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    log_extra("letters", lengths)
    log_metric("letters", sum(lengths) / len(lengths))
    for prompt in prompts:
        log_metric("metric of " + prompt[0]["content"], 3.0)
    return [float(length % 5) for length in lengths]


def some_left_out(completions, **kwargs):
    """More of them on one process than on the other."""
    scores = length_mod_5(completions=completions, **kwargs)
    return [None if score == 4 else score for score in scores]


# Without a warm-up: of a batch with rows left out its fits in another order of rows differ by more than rounding.
WAYS = {
    "none": (length_mod_5, {"ratio_norm": "none"}),
    "single": (length_mod_5, {"num_ppo_epochs": 1}),  # one update, whose graph lives through the reference's pass
    "mean": (length_mod_5, {"ratio_norm": "mean"}),
    "4-bits": (length_mod_5, {"ratio_norm": "mean"}),  # of the base
    "left-out": (some_left_out, {"value_warmup_batches": 0, "scale_rewards": False}),
}


def iterate(model_folder: str, out: Path, batch: int, contexts: int, way: str) -> None:
    reward, settings = WAYS[way]
    prompts = Dataset.from_dict({"prompt": ["walk " * (1 + i) for i in range(contexts)]})
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True) if way == "4-bits" else None
    policy = GivenCompletions.from_hard_prompt(
        model_folder, "You are a kind helper.", dtype="float32", quantization_config=in_4_bits
    )
    policy.seen = []
    start = soft_prefix(policy.model).detach().clone()
    args = SingleStepPPOConfig(
        output_dir=str(out / f"run-{way}"),
        per_device_train_batch_size=batch,
        max_steps=3,
        max_completion_length=4,
        learning_rate=1e-3,
        entropy_coef=0.1,
        num_mini_batches=1,  # mini-batches are drawn by each process for itself
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"num_ppo_epochs": 2} | settings,
    )
    trainer = SingleStepPPOTrainer(
        model=policy, reward_funcs=reward, args=args, train_dataset=prompts, eval_dataset=prompts.select(range(3))
    )
    trainer.train()
    seen = gather_object([policy.seen])
    if trainer.is_world_process_zero():
        head = {f"value head {k}": v.contiguous() for k, v in trainer.value_head.state_dict().items()}
        prefix = soft_prefix(policy.model).detach()
        save_file({"prefix": prefix, "moved": prefix - start, **head}, out / f"{way}.safetensors")
        log = trainer.state.log_history
        result = {"world_size": args.world_size, "seen": seen, "log": log}
        (out / f"{way}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model_folder, out, batch, contexts = sys.argv[1:]
    for way in WAYS:
        iterate(model_folder, Path(out), int(batch), int(contexts), way)
    PartialState().destroy_process_group()
