"""Some PPO iterations with given completions, for two `ratio_norm`s; each writes what it ends with and who took part.

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
from transformers import set_seed

from h2s.models import load_base_model, load_tokenizer
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.policy import PolicyWithValueHead
from h2s.ppo.trainer import SingleStepPPOTrainer
from h2s.prefix.adapter import add_hard_prompt, prefix_from_hard_prompt, soft_prefix
from h2s.prefix.chat_template import chat_prefix, encode_prompts, wrap_chat_template


class GivenCompletions(SingleStepPPOTrainer):
    """Replies that depend on the prompt alone, of unlike lengths, so that every launch learns from the same ones."""

    def _sample(self, prompts):
        self.seen.append([sum(p) for p in prompts])
        completions = []
        for prompt in prompts:
            start, length = sum(prompt), 2 + sum(prompt) % 7
            completions.append([6 + (start * 7 + 13 * i) % 250 for i in range(length)] + [5])
        return completions


def iterate(model_folder: str, out: Path, batch: int, contexts: int, ratio_norm: str) -> None:
    tokenizer = load_tokenizer(model_folder)
    prefix = chat_prefix(tokenizer, "You are a kind helper.")
    wrap_chat_template(tokenizer, prefix)
    prompts = [[{"role": "user", "content": "walk " * (1 + i)}] for i in range(contexts)]
    rows = [
        {"prompt": c, "prompt_ids": p, "conversation": str(i)}
        for i, (c, p) in enumerate(zip(prompts, encode_prompts(tokenizer, prefix, prompts), strict=True))
    ]
    args = SingleStepPPOConfig(
        output_dir=str(out / f"run-{ratio_norm}"),
        per_device_train_batch_size=batch,
        max_steps=3,
        max_completion_length=4,
        learning_rate=1e-3,
        entropy_coef=0.1,
        num_ppo_epochs=2,
        num_mini_batches=1,  # mini-batches are drawn by each process for itself
        ratio_norm=ratio_norm,
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(0)  # the value head starts at random
    model = prefix_from_hard_prompt(load_base_model(model_folder, dtype="float32"), prefix.token_ids)
    add_hard_prompt(model, prefix.token_ids)
    trainer = GivenCompletions(
        model=PolicyWithValueHead(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tokenizer,
        prefix=prefix,
        reward=lambda prompts, completions: [float(len(c[0]["content"]) % 5) for c in completions],
    )
    trainer.seen = []
    start = soft_prefix(model).detach().clone()
    trainer.train()
    seen = gather_object([trainer.seen])
    if trainer.is_world_process_zero():
        head = {f"value head {k}": v.contiguous() for k, v in trainer.policy.value_head.state_dict().items()}
        prefix_now = soft_prefix(model).detach()
        save_file({"prefix": prefix_now, "moved": prefix_now - start, **head}, out / f"{ratio_norm}.safetensors")
        evaluated = [line["eval_contexts"] for line in trainer.state.log_history if "eval_contexts" in line]
        result = {"world_size": args.world_size, "seen": seen, "evaluated": evaluated}
        (out / f"{ratio_norm}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model_folder, out, batch, contexts = sys.argv[1:]
    for ratio_norm in ("none", "mean"):
        iterate(model_folder, Path(out), int(batch), int(contexts), ratio_norm)
    PartialState().destroy_process_group()
