"""One PPO update with given completions; each launch writes its gradients and who took part.

accelerate launch --config_file accelerate_configs/cpu.yaml tests/distributed/one_update.py MODEL OUT BATCH NORM
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from transformers import set_seed

from h2s.chat_prefix import chat_prefix, encode_prompts, wrap_chat_template
from h2s.ppo_config import SingleStepPPOConfig
from h2s.ppo_trainer import SingleStepPPOTrainer
from h2s.prefix import add_hard_prompt, load_base_model, load_tokenizer, prefix_from_hard_prompt, soft_prefix
from h2s.value_head import PolicyWithValueHead


class GivenCompletions(SingleStepPPOTrainer):
    """Replies that depend on the prompt alone, of unlike lengths, so that every launch learns from the same ones."""

    def _sample(self, prompts):
        self.seen = [sum(p) for p in prompts]
        completions = []
        for prompt in prompts:
            start, length = sum(prompt), 2 + sum(prompt) % 7
            completions.append([6 + (start * 7 + 13 * i) % 250 for i in range(length)] + [5])
        return completions

    def _apply(self, loss):
        self.accelerator.backward(loss)
        head = self.policy.value_head
        self.gradients = {"prefix": soft_prefix(self.policy.model).grad.clone(), "value": head.out.weight.grad.clone()}
        self.optimizer.zero_grad(set_to_none=True)
        return 1.0


def main(model_folder: str, out: str, batch: str, ratio_norm: str) -> None:
    tokenizer = load_tokenizer(model_folder)
    prefix = chat_prefix(tokenizer, "You are a kind helper.")
    wrap_chat_template(tokenizer, prefix)
    contexts = [[{"role": "user", "content": "walk " * (1 + i)}] for i in range(8)]
    rows = [
        {"prompt": c, "prompt_ids": p, "conversation": str(i)}
        for i, (c, p) in enumerate(zip(contexts, encode_prompts(tokenizer, prefix, contexts), strict=True))
    ]
    args = SingleStepPPOConfig(
        output_dir=str(Path(out).parent / f"run-{Path(out).stem}"),
        per_device_train_batch_size=int(batch),
        max_steps=1,
        num_ppo_epochs=1,
        value_warmup_batches=0,
        entropy_coef=0.1,
        ratio_norm=ratio_norm,
        eval_strategy="no",
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
        eval_dataset=None,
        processing_class=tokenizer,
        prefix=prefix,
        reward=lambda prompts, completions: [float(len(c[0]["content"]) % 5) for c in completions],
    )
    trainer.train()
    seen = gather_object([trainer.seen])
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in trainer.gradients.items()}, out)
        Path(out).with_suffix(".json").write_text(json.dumps({"world_size": args.world_size, "seen": seen}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
