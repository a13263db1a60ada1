"""A trainer of one number, whose evaluations are scripted."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from h2s.run.checkpoints import WholeCheckpoints


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.slope * x - 1) ** 2).mean(), "logits": self.slope * x}


class Scripted(WholeCheckpoints):
    """Evaluations give the losses of a list; `done` lists what is asked of it at the end."""

    def __init__(self, losses=(), **kwargs):
        super().__init__(**kwargs)
        self.losses, self.done = losses, []
        self.adapter = SimpleNamespace(
            base_model="makers/line",
            write_card=lambda folder, report="": (folder / "README.md").write_text("card", encoding="utf-8"),
        )

    def learnt_from(self, rows):
        return ["x"]

    def short_line(self, logs):
        return f"loss {logs['loss']:.1f}" if "loss" in logs else None

    def load_kept(self):
        self.done.append("kept")

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.losses[self.state.global_step - 1]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            save_file(self.model.state_dict(), os.path.join(output_dir, "adapter_model.safetensors"))
            if "checkpoint-" in output_dir:  # as Trainer's own does
                torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(load_file(os.path.join(resume_from_checkpoint, "adapter_model.safetensors")))


@pytest.fixture
def build(tmp_path):
    def make(losses=(3, 1, 2, 2, 2), limit: int | None = 1, callbacks=None, rows=3, first=1.0, **settings) -> Scripted:
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "run"),
                "max_steps": len(losses),
                "per_device_train_batch_size": 1,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
                "save_total_limit": limit,
                "metric_for_best_model": "loss",
                "greater_is_better": False,
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | settings
        )
        data = Dataset.from_dict({"x": [first, *(float(n) for n in range(2, rows + 1))]})
        return Scripted(losses, model=Line(), args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)

    return make


@pytest.fixture
def said():
    """What h2s logs."""
    lines, logger = [], logging.getLogger("h2s")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
