"""The policy, sharded by FSDP2's `fully_shard` over two processes, against itself whole.

    torchrun --nproc_per_node 2 tests/distributed/sharded.py MODEL OUT

Each process holds a half of every decoder layer, of the prefix encoder and of the rest. Writes what both versions gave.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft.tuners.prefix_tuning import PrefixEncoder
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from h2s import PrefixTuningPolicyModel
from h2s.ppo.policy import PolicyWithValueHead
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Batch


def main(model_folder: str, out: str) -> None:
    dist.init_process_group("gloo")

    def build() -> tuple[PrefixTuningPolicyModel, PolicyWithValueHead]:
        torch.manual_seed(0)
        policy = PrefixTuningPolicyModel.from_hard_prompt(model_folder, "You are a kind helper.", device="cpu")
        policy.add_hard_prompt()
        trained = PolicyWithValueHead(policy.model)
        torch.nn.init.normal_(trained.value_head.out.weight)
        return policy, trained

    def learn(trained: PolicyWithValueHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and the prefix's gradient, on each process's own rows."""
        rank = dist.get_rank()
        prompts, completions = [[7 + rank, 8, 9], [10, 11 + rank]], [[12, 13, 5], [14, 5]]
        batch = Batch.from_rows(policy.tokenizer, prompts, completions, "cpu")
        logps, entropy, values = trained(batch.input_ids, batch.attention_mask, batch.completion_mask)
        (logps.sum() + entropy.sum() + values.sum()).backward()
        return logps.detach(), soft_prefix(trained.model).grad

    def full(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    policy, whole = build()
    logps, gradient = learn(whole)
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()  # the mean over processes, as FSDP and DDP take it

    policy, trained = build()
    for module in [m for m in trained.modules() if isinstance(m, (PrefixEncoder, Gemma3DecoderLayer))]:
        fully_shard(module)
    fully_shard(trained)
    sharded_logps, sharded_gradient = learn(trained)
    # Every process takes part in gathering the prefix, the first one writes.
    policy.save_pretrained(out, is_main_process=dist.get_rank() == 0)
    trained.save_value_head(out, is_main_process=dist.get_rank() == 0)
    result = {
        "world_size": dist.get_world_size(),
        "logps": (sharded_logps - logps).abs().max().item(),
        "gradient": ((full(sharded_gradient) - gradient).abs().max() / gradient.abs().max()).item(),
        "largest gradient": gradient.abs().max().item(),
        "rows of the prefix here": soft_prefix(trained.model).to_local().shape[0],
        "rows of the prefix": soft_prefix(whole.model).shape[0],
    }
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        head = whole.value_head.state_dict()
        save_file({"prefix": soft_prefix(whole.model).detach(), **head}, Path(out) / "whole.safetensors")
        (Path(out) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
