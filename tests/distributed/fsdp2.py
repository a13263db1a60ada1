"""PPO on a policy that FSDP2 shards, by Trainer and accelerate themselves, on two CPU processes; or whole, on one.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/distributed/fsdp2.py MODEL OUT 2
    python tests/distributed/fsdp2.py MODEL OUT 4

On CPU accelerate takes any launch of FSDP for DDP; here it is told that these are the processes that FSDP is for.
Two iterations, then a resumed third; replies are those of `updates.py`, but for the last, which are drawn.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from updates import GivenCompletions, length_mod_5

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.prefix.adapter import soft_prefix
from h2s.report.what_changed import layer_movement

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


def train(model_folder: str, out: Path, batch: int, max_steps: int, passes: int, resume: bool) -> SingleStepPPOTrainer:
    prompts = Dataset.from_dict({"prompt": ["walk " * (1 + i) for i in range(9)]})
    policy = GivenCompletions.from_hard_prompt(model_folder, "You are a kind helper.", dtype="float32", device="cpu")
    policy.seen = []
    args = SingleStepPPOConfig(
        output_dir=str(out / f"run-{passes}"),
        per_device_train_batch_size=batch,
        max_steps=max_steps,
        max_completion_length=8,
        learning_rate=1e-3,
        entropy_coef=0.1,
        num_ppo_epochs=passes,
        num_mini_batches=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=None,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SingleStepPPOTrainer(
        model=policy, reward_funcs=length_mod_5, args=args, train_dataset=prompts, eval_dataset=prompts.select(range(4))
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(model_folder: str, out: str, batch: str) -> None:
    folder = Path(out)
    # One pass is one update, whose graph lives through the reference's pass.
    train(model_folder, folder, int(batch), 3, passes=1, resume=False)
    train(model_folder, folder, int(batch), 2, passes=2, resume=False)
    trainer = train(model_folder, folder, int(batch), 3, passes=2, resume=True)
    policy = trainer.policy
    soft = soft_prefix(policy.model).detach()
    sharded = isinstance(policy.module, FSDPModule) and isinstance(soft, DTensor)
    # Each process answers other conversations, of other lengths, and they end at other steps.
    conversations = ["tea"] if PartialState().process_index else ["hello", "walk " * 9]
    policy.__class__ = PrefixTuningPolicyModel
    replies = policy.generate(conversations, max_completion_length=12, temperature=0)
    table, moved = trainer.compare(trainer.eval_dataset), layer_movement(policy.model)
    whole = soft.full_tensor() if sharded else soft
    if trainer.is_world_process_zero():
        save_file({"prefix": whole.contiguous()}, folder / "end.safetensors")
        result = {
            "sharded": sharded,
            "world_size": trainer.args.world_size,
            "rows here": len(soft.to_local()) if sharded else len(soft),
            "rows": len(whole),
            "moved": moved.to_numpy().tolist(),
            "log": trainer.state.log_history,
            "replies": replies,
            "report": {name: table[name].tolist() for name in ("soft", "hard", "kl", "soft_reward")},
        }
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    # DTensors and their mesh keep gloo's threads, which may want the interpreter's lock when it is gone: an abort, at
    # random. It ends here, with all that it had to do done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
