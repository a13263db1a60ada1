"""What the benchmarks share: the same work for all, clocks and memory, child processes, tables.

Letters: B replies, P tokens of the hard prompt (the prefix), T of the conversation after it, C of the completion.
"""

import ctypes
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import h2s
from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MARK = "measured: "  # before the lines of a child that its parent reads
MINI_BATCHES = 2
WORDS = ["tea", "rain", "walk", "book", "work", "cat", "song", "run", "soup", "trip", "film", "game"]
PIECES = [" a", " I", " tea", ".", "!", ",", "x", "s"]


# ---- the work, the same for all ----


def text_of(count: Callable[[str], int], tokens: int, seed: int) -> str:
    """A text of which `count` is exactly `tokens`."""
    draw = random.Random(seed)
    words = draw.choices(WORDS, k=tokens)
    few, many = 0, tokens
    while few < many:
        half = (few + many + 1) // 2
        few, many = (half, many) if count(" ".join(words[:half])) <= tokens else (few, half - 1)
    text = " ".join(words[:few])
    for _ in range(1000):
        if count(text) == tokens:
            return text
        longer = text + draw.choice(PIECES)
        text = longer if count(longer) <= tokens else text
    raise SystemExit(f"no text of {tokens} tokens: the chat template alone may have more")


def load(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model and its tokenizer, whose stop token is beyond the vocabulary: no completion ever stops.

    So all arms draw completions of one length by their usual ways, which look for a stop token at each step.
    """
    dtype = torch.bfloat16 if CUDA else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval().requires_grad_(False)
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()  # pages of the file come and go: all of the model shall be in memory
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<never drawn>"})
    if tokenizer.eos_token_id < base.get_input_embeddings().num_embeddings:
        raise SystemExit(f"{folder} embeds tokens that its tokenizer does not know: any stop token may be drawn")
    base.generation_config.eos_token_id = None
    return base, tokenizer


def hard_prompt(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A system prompt that is `tokens` long together with what the chat template puts around it."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    policy = PrefixTuningPolicyModel.from_hard_prompt(base, WORDS[0], tokenizer=tokenizer)
    return text_of(count, tokens - len(policy.prefix.token_ids) + count(WORDS[0]), seed=0)


def policy_of(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> PrefixTuningPolicyModel:
    """A policy whose prefix is `tokens` long."""
    text = hard_prompt(base, tokenizer, tokens)
    policy = PrefixTuningPolicyModel.from_hard_prompt(base, text, tokenizer=tokenizer)
    policy.stop_ids = [tokenizer.eos_token_id]
    return policy


def contexts_of(policy: PrefixTuningPolicyModel, rows: int, tokens: int) -> Dataset:
    """Conversations of `tokens` tokens after the prefix: of one length, since TRL pads on the left."""

    def messages(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def count(text: str) -> int:
        return len(policy.encode([messages(text)], 1)[0]) if text else 0

    return Dataset.from_dict({"prompt": [messages(text_of(count, tokens, seed)) for seed in range(rows)]})


def reward(completions: list, **kwargs: Any) -> list[float]:
    """The share of question marks, and a little of the length: cheap, and hardly ever twice the same."""
    assert len({len(ids) for ids in kwargs["completion_ids"]}) == 1, "a completion stopped"
    texts = [completion[0]["content"] for completion in completions]
    return [text.count("?") / (len(text) + 1) + len(text) / 1000 for text in texts]


def ppo_trainer(
    policy: PrefixTuningPolicyModel,
    contexts: Dataset,
    batch: int,
    completion: int,
    updates: int,
    steps: int,
    folder: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> SingleStepPPOTrainer:
    """h2s's trainer: an iteration is `batch` replies on this process and `updates` updates on half of them each."""
    args = SingleStepPPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_completion_length=completion,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=updates // MINI_BATCHES,
        target_kl=None,  # it would end updates early
        value_warmup_batches=0,
        scale_rewards=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not CUDA,
    )
    return SingleStepPPOTrainer(policy, reward, args, train_dataset=contexts, callbacks=list(callbacks))


# ---- clocks and memory ----


def now() -> float:
    """Seconds, after all that the card has still to do."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def status(name: str) -> int:
    """A line of Linux's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"memory is measured by {name} of /proc/self/status, which is not there: Linux is needed")


def give_back_memory() -> None:
    """Free memory that the C library keeps would hide what is allocated next (glibc)."""
    gc.collect()
    if not CUDA:
        ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Seconds and peak memory above what the process holds when the meter is made: the model, mostly.

    On CPU that is resident memory, of which Linux keeps the largest value (VmHWM) and lets a process begin anew (5 into
    clear_refs); on a card what torch has allocated there.
    """

    def __init__(self):
        # The first step of an optimizer imports a good part of torch, which is nobody's memory and nobody's time.
        weight = torch.zeros(1, requires_grad=True, device=DEVICE)
        weight.sum().backward()
        torch.optim.AdamW([weight]).step()
        give_back_memory()
        self.own = torch.cuda.memory_allocated() if CUDA else status("VmRSS")

    def start(self) -> None:
        give_back_memory()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.started = now()

    def stop(self) -> dict[str, float]:
        seconds = now() - self.started
        peak = torch.cuda.max_memory_allocated() if CUDA else status("VmHWM")
        return {"seconds": seconds, "bytes": peak - self.own}

    def of(self, work: Callable[[], Any]) -> dict[str, float]:
        self.start()
        work()
        return self.stop()


class Phases:
    """Where an iteration's time goes, by two moments that all trainers have, in this order.

    Sampling ends with the model's `generate`; scoring, rewards included, ends where the decoder first runs with
    gradients; what is left is updates.
    """

    def __init__(self, base: PreTrainedModel):
        self.generate, base.generate = base.generate, self._generate
        base.get_decoder().register_forward_pre_hook(self._before_decoder)
        self.begin()

    def begin(self) -> None:
        self.sampled = self.scored = 0.0

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        output = self.generate(*args, **kwargs)
        self.sampled = now()
        return output

    def _before_decoder(self, *_: Any) -> None:
        if self.sampled and not self.scored and torch.is_grad_enabled():
            self.scored = now()

    def seconds(self, meter: Meter, total: float) -> dict[str, float]:
        sampling, scoring = self.sampled - meter.started, self.scored - self.sampled
        return {"sampling": sampling, "scoring": scoring, "updates": total - sampling - scoring}


class Iterations(TrainerCallback):
    """Measures a trainer's iterations of `steps` steps each.

    Args:
        base: the model that answers.
        steps: of the trainer in an iteration.
        before: called before an iteration, the first one excepted.
        after: called with an iteration's measures.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        steps: int,
        before: Callable[[], None],
        after: Callable[[dict[str, float]], None],
    ):
        self.steps, self.before, self.after = steps, before, after
        self.phases = Phases(base)
        self.meter: Meter | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        if self.meter is None:
            self.meter = Meter()
        else:
            self.before()
        self.phases.begin()
        self.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.meter is not None and state.global_step % self.steps == 0:
            measures = self.meter.stop()
            self.after(measures | self.phases.seconds(self.meter, measures["seconds"]))


# ---- child processes ----


def tell(**measures: Any) -> None:
    """In a child: a line that the parent reads."""
    print(MARK + json.dumps(measures), flush=True)


def wait() -> None:
    """In a child: until the parent asks; ends the process where it asks no more."""
    if not sys.stdin.readline():
        sys.exit()


class Child:
    """A process that measures one arm, whenever it is asked: between, it holds its model and does nothing."""

    def __init__(self, command: list[str], threads: int, checkout: str | None = None):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if checkout is not None:
            environment["PYTHONPATH"] = checkout
        self.command, self.said = command, []
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def hear(self) -> dict[str, Any]:
        """The next line of measures."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.said.append(line)
        raise SystemExit(f"{''.join(self.said[-40:])}\n{' '.join(self.command)} ended by itself")

    def ask(self) -> dict[str, Any]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def as_child(function: Callable[[SimpleNamespace], None]) -> None:
    """Run `function` on the settings that the parent gave."""
    settings = SimpleNamespace(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    function(settings)


def child_command(script: str, **settings: Any) -> list[str]:
    return [script, "--child", json.dumps(settings)]


# ---- what is printed ----


def model_folder(name: str, scratch: str) -> str:
    """`tiny` is the tests' random model, made here; `embedded:` names are folders of a cache."""
    from h2s.models import resolve_embedded

    if name != "tiny":
        return resolve_embedded(name)
    sys.path.append(str(ROOT / "tests"))
    from tiny import save_gemma

    return str(save_gemma(Path(scratch) / "tiny", positions=8192))


def checkout(package: str = h2s.__file__) -> str:
    """The folder that holds an h2s, and its commit."""
    folder = Path(package).parents[1]
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return f"{folder} at {commit or 'no commit'}"


def machine(threads: int) -> str:
    """The machine, the versions and the command, as Markdown."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory, busy = psutil.virtual_memory().total / 2**30, os.getloadavg()[0]
    names.append(platform.processor())
    card = f", {torch.cuda.get_device_name()}" if CUDA else ""
    libraries = ("torch", "transformers", "peft", "trl", "accelerate")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return "\n".join(
        [
            f"- command: `python {' '.join(sys.argv)}`",
            f"- machine: {names[0]}, {os.cpu_count()} cores, {memory:.0f} GiB{card}; {threads} threads; "
            f"load {busy:.1f} before it began",
            f"- versions: Python {platform.python_version()}, {versions}",
        ]
    )


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (least to most)`."""
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round: what disturbs a round disturbs both."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ---- a run that was stopped and goes on ----


def check_same(file: Path, shared: dict[str, str]) -> None:
    """What is there was made with the same settings, but for arms and seeds: else one table would hold both."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else shared
    other = [f"{name} {before.get(name)!r}, now {now!r}" for name, now in shared.items() if before.get(name) != now]
    if other:
        raise SystemExit(f"{file.parent} holds results of other settings: {'; '.join(other)}: take another --out")
    file.write_text(json.dumps(shared, indent=1), encoding="utf-8")
