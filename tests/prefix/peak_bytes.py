"""Prints how many bytes scoring 256 positions of a 262,144-token vocabulary takes: h2s's way, and with all logits."""

import json
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from h2s.prefix.adapter import random_prefix
from h2s.prefix.generation import Batch, completion_logps

PROMPT, COMPLETION = 12, 128
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
config = Gemma3TextConfig(vocab_size=262_144, num_hidden_layers=2, **SIZES)
model = random_prefix(Gemma3ForCausalLM(config).eval().requires_grad_(False), 4)
ids = torch.arange(2 * (PROMPT + COMPLETION)).view(2, -1)
batch = Batch(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand(2, -1) >= PROMPT)


def all_logits(model, batch):
    distribution = model(batch.input_ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    logps = distribution.gather(-1, batch.input_ids[:, PROMPT:, None])[..., 0]
    return logps, -(distribution.exp() * distribution).sum(-1)


def resident(which):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def extra_bytes(scoring):
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted anew
    before = resident("VmRSS")
    logps, entropy = scoring(model, batch)
    (logps.sum() + entropy.sum()).backward()
    return resident("VmHWM") - before


completion_logps(model, Batch(*(x[:, PROMPT - 2 : PROMPT + 2] for x in batch)))[0].sum().backward()  # threads, buffers
print(json.dumps([extra_bytes(completion_logps), extra_bytes(all_logits)]))
