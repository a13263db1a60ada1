"""What the tests of PPO runs share: contexts, rewards, and how to look into a run."""

import math
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from safetensors.torch import load_file
from tiny import sample_context

from h2s.prefix.adapter import soft_prefix

BATCH, HELD_OUT = 6, 5
# One context many times, replies of four tokens, nothing but the reward: what can be learnt is learnt within seconds.
EASY = {
    "per_device_train_batch_size": 16,
    "max_completion_length": 4,
    "learning_rate": 1e-1,
    "kl_coef": 0.0,
    "missing_eos_penalty": 0.0,
}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
KEEP_ALL = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def contexts_of(indices: Iterable[int]) -> Dataset:
    """What `load_contexts` gives, with a further column."""
    rows = list(indices)
    return Dataset.from_dict({"prompt": [sample_context(i) for i in rows], "number": rows})


def texts(completions):
    """As TRL's reward functions are given them: a completion is a list of one message."""
    return [message["content"] for (message,) in completions]


def not_ascii(completions, **kwargs):
    """A reward that is easy to raise: the share of characters beyond ASCII."""
    return [sum(not c.isascii() for c in text) / max(1, len(text)) for text in texts(completions)]


def varied(completions, **kwargs):
    """A reward with neither ties nor a trend: a hash of the reply's letters."""
    return [math.sin(sum(map(ord, c)) + len(c)) for c in texts(completions)]


def same(value):
    """A reward that gives every reply the same."""
    return lambda completions, **kwargs: [value] * len(completions)


class Course:
    """A reward that says how each evaluation of the held-out contexts ends: soft minus hard."""

    def __init__(self, differences):
        self.differences, self.calls = differences, 0

    def __call__(self, completions, **kwargs):
        if len(completions) != HELD_OUT:
            return varied(completions)
        evaluation, hard = divmod(self.calls, 2)
        self.calls += 1
        return [0.0 if hard else self.differences[evaluation]] * HELD_OUT


def prefix_of(trainer):
    return soft_prefix(trainer.policy.model).detach().clone()


def saved_prefix(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")["prompt_embeddings"]


def root_of(trainer) -> Path:
    return Path(trainer.args.output_dir)


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def inputs_of(trainer, rows=range(BATCH)):
    """As the data loader gives an iteration its contexts."""
    return trainer.train_dataset[list(rows)]


def given_completions(trainer):
    """Let the policy answer with what depends on the prompt alone: 1 to 4 tokens and the end of the turn."""
    draw = trainer.policy.draw

    def given(prompts, *rest):
        ids = [[6 + (sum(p) * 7 + 13 * i) % 250 for i in range(1 + sum(p) % 4)] + [5] for p in prompts]
        return draw(prompts, trainer.sampling)._replace(ids=ids, logps_and_entropy=None)

    trainer.policy.draw = given


def rows_of(rollout):
    """Token ids, completion mask and log-probabilities of each row, in the order of the contexts."""
    rows = {}
    for part in rollout.parts:
        for i, row in enumerate(part.rows.tolist()):
            rows[row] = part.batch.input_ids[i], part.mask[i], part.old_logps[i]
    return [rows[i] for i in range(len(rows))]
