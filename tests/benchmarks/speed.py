"""How fast h2s is beside other ways to do the same work, in the same run on the same machine.

    python tests/benchmarks/speed.py
    python tests/benchmarks/speed.py --model tiny --rounds 1    # a quick look: its figures say nothing
    python tests/benchmarks/speed.py --arms ad --before FOLDER  # an older checkout of h2s beside this one

The arms, on one model, with completions of one length (the stop token lies beyond the vocabulary, for all):

- a: an iteration of h2s's SingleStepPPOTrainer: B replies, scored under both prompts, updates on half of them each.
- b: the same by TRL's RLOOTrainer on the same prefix: half of B replies to each of two prompts; the reference is its
  second adapter.
- c: the same by RLOOTrainer on a LoRA (PEFT's defaults), with the hard prompt as text in front of each conversation.
- d: rollouts alone: h2s's `complete` with the prompt as a prefix, transformers' `generate` with it as text.
- e: log-probabilities and entropies of 256 positions, forward and backward: h2s's, and by the full logits.

Each is a process of its own, which loads the model once, does the work once unmeasured, and waits; then all are asked
in turn, round by round. They hold the model once each: 2 GB a process in float32 for Gemma 3 270M, libraries included,
14 GB in all, 18 GB with --before.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import measuring
import torch
from measuring import (
    CUDA,
    DEVICE,
    MINI_BATCHES,
    Child,
    Iterations,
    Meter,
    as_child,
    child_command,
    contexts_of,
    hard_prompt,
    load,
    now,
    policy_of,
    ppo_trainer,
    ratios,
    reward,
    spread,
    table,
    tell,
    wait,
)
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from h2s.prefix.generation import Sampling

POSITIONS = 256
NAMES = {
    "h2s": "(a) h2s",
    "before": "(a) h2s, before",
    "trl-prefix": "(b) TRL RLOO, same prefix",
    "trl-lora": "(c) TRL RLOO, LoRA and prompt as text",
    "complete": "(d) h2s `complete`",
    "complete-before": "(d) h2s `complete`, before",
    "generate": "(d) `generate`, prompt as text",
    "logprobs": "(e) log-probabilities",
    "limits": "limits",
}
ARMS = {"a": ["h2s"], "b": ["trl-prefix"], "c": ["trl-lora"], "d": ["complete", "generate"], "e": ["logprobs"]}


# ---- the arms, each in its process ----


def after_ready(ready: list[bool]) -> Callable[[dict[str, float]], None]:
    """The first measures are the unmeasured iteration's: they only say that the child is ready."""

    def after(measures: dict[str, float]) -> None:
        tell(**(measures if ready else {"checkout": measuring.checkout()}))
        ready.append(True)

    return after


def h2s_iterations(s: SimpleNamespace) -> None:
    """(a)"""
    base, tokenizer = load(s.folder)
    policy = policy_of(base, tokenizer, s.prefixes[0])
    contexts = contexts_of(policy, s.batch, s.prompt)
    callback = Iterations(base, 1, before=wait, after=after_ready([]))
    with tempfile.TemporaryDirectory() as folder:
        steps = s.rounds + 1
        ppo_trainer(policy, contexts, s.batch, s.completion, s.updates, steps, folder, [callback]).train()


def rloo(s: SimpleNamespace, base: PreTrainedModel, **arguments: Any) -> None:
    """An iteration of TRL's has a step an update."""
    with tempfile.TemporaryDirectory() as folder:
        args = RLOOConfig(
            output_dir=folder,
            max_steps=(s.rounds + 1) * s.updates,
            per_device_train_batch_size=s.batch // MINI_BATCHES,
            steps_per_generation=MINI_BATCHES,
            num_iterations=s.updates // MINI_BATCHES,
            num_generations=s.batch // MINI_BATCHES,
            max_completion_length=s.completion,
            temperature=1.0,
            beta=0.05,
            learning_rate=1e-3,
            gradient_checkpointing=False,  # crashes with a prefix, and costs time
            bf16=False,  # the model is loaded in its dtype
            use_cpu=not CUDA,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        callbacks = [Iterations(base, s.updates, before=wait, after=after_ready([]))]
        RLOOTrainer(reward_funcs=reward, args=args, callbacks=callbacks, **arguments).train()


def trl_prefix(s: SimpleNamespace) -> None:
    """(b)"""
    base, tokenizer = load(s.folder)
    policy = policy_of(base, tokenizer, s.prefixes[0])
    contexts = contexts_of(policy, s.batch, s.prompt)
    rloo(s, base, model=policy.model, train_dataset=contexts, processing_class=policy.tokenizer)


def trl_lora(s: SimpleNamespace) -> None:
    """(c)"""
    base, tokenizer = load(s.folder)
    system = {"role": "system", "content": hard_prompt(base, tokenizer, s.prefixes[0])}
    contexts = contexts_of(policy_of(base, tokenizer, s.prefixes[0]), s.batch, s.prompt)
    contexts = contexts.map(lambda row: {"prompt": [system, *row["prompt"]]}, load_from_cache_file=False)
    lora = LoraConfig(task_type="CAUSAL_LM")
    rloo(s, base, model=base, train_dataset=contexts, processing_class=tokenizer, peft_config=lora)


def rollouts(s: SimpleNamespace) -> None:
    """(d): by h2s or as text; of the shortest hard prompt also a single token, which tells what a further one costs."""
    base, tokenizer = load(s.folder)
    policies = {length: policy_of(base, tokenizer, length) for length in s.prefixes}
    rows = {length: policy.encode(contexts_of(policy, s.batch, s.prompt), 1) for length, policy in policies.items()}

    def draw(length: int, completion: int) -> None:
        if s.arm == "generate":
            ids = torch.tensor([policies[length].prefix.token_ids + row for row in rows[length]], device=DEVICE)
            config = GenerationConfig(
                max_new_tokens=completion,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            with torch.no_grad():
                drawn = base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            lengths = {drawn.shape[1] - ids.shape[1]}
        else:
            lengths = {len(c) for c in policies[length].complete(rows[length], Sampling(completion))}
        assert lengths == {completion}, lengths

    draw(s.prefixes[0], 2)
    meter = Meter()
    tell(checkout=measuring.checkout())
    while True:
        wait()
        first = meter.of(lambda: draw(s.prefixes[0], 1))["seconds"]
        whole = {str(n): meter.of(lambda n=n: draw(n, s.completion)) for n in s.prefixes}
        step = (whole[str(s.prefixes[0])]["seconds"] - first) / (s.completion - 1)
        tell(whole=whole, step=step)


def logprobs(s: SimpleNamespace) -> None:
    """(e): the decoder alone too, whose memory all need."""
    base, tokenizer = load(s.folder)
    policy = policy_of(base, tokenizer, s.prefixes[0])
    length = POSITIONS // s.batch
    prompt = torch.tensor(policy.encode(contexts_of(policy, s.batch, s.prompt), 1), device=DEVICE)
    drawn = torch.randint(10, 300, (s.batch, length), device=DEVICE)
    ids = torch.cat([prompt, drawn], dim=1)  # (B, T + C)
    mask, completion = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    completion[:, prompt.shape[1] :] = True

    def ours() -> torch.Tensor:
        logps, entropy = policy.module(ids, mask, completion, 1.0)[:2]  # an older h2s says more
        return logps.sum() + entropy.sum()

    def naive() -> torch.Tensor:
        logits = policy.model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits[:, :-1].float()
        logps = logits.log_softmax(-1)  # (B, C, V)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, drawn[..., None]).sum() + entropy.sum()

    def decoder_alone() -> torch.Tensor:
        full = torch.ones(s.batch, s.prefixes[0] + ids.shape[1], dtype=mask.dtype, device=DEVICE)
        past = policy.model.get_prompt(s.batch)
        return base.get_decoder()(input_ids=ids, attention_mask=full, past_key_values=past).last_hidden_state.sum()

    ways = {"h2s": ours, "full logits": naive, "the decoder alone": decoder_alone}
    difference = (ours() - naive()).abs().item() / POSITIONS
    assert difference < (0.1 if CUDA else 1e-2), difference
    meter = Meter()
    tell(checkout=measuring.checkout())
    while True:
        wait()
        measures = {name: meter.of(lambda way=way: way().backward()) for name, way in ways.items()}
        policy.model.zero_grad()
        tell(**measures)


@torch.no_grad()
def limits(s: SimpleNamespace) -> None:
    """What a decode step cannot be faster than: all weights read once; its matrix products and nothing between them.

    Of the products the faster of x @ W.T and W @ x.T counts, weight by weight; one pass over the model has all of one
    way, so that no weight is in a cache from its last turn.
    """
    base, _ = load(s.folder)
    linear = [module.weight for module in base.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    weights = [*linear, base.get_output_embeddings().weight]
    inputs = [torch.randn(s.batch, w.shape[1], dtype=w.dtype, device=DEVICE) for w in weights]

    def seconds(work: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[float]:
        taken = []
        for weight, x in zip(weights, inputs, strict=True):
            begun = now()
            work(weight, x)
            taken.append(now() - begun)
        return taken

    tell(checkout=measuring.checkout())
    while True:
        wait()
        passes = {"read": [], "rows": [], "columns": []}
        for _ in range(5):
            passes["read"].append(seconds(lambda w, x: w.sum()))
            passes["rows"].append(seconds(lambda w, x: x @ w.T))
            passes["columns"].append(seconds(lambda w, x: (w @ x.T).T))
        fastest = {name: [min(times) for times in zip(*runs, strict=True)] for name, runs in passes.items()}
        products = sum(min(pair) for pair in zip(fastest["rows"], fastest["columns"], strict=True))
        tell(read=sum(fastest["read"]), products=products)


RUN = {
    "h2s": h2s_iterations,
    "before": h2s_iterations,
    "trl-prefix": trl_prefix,
    "trl-lora": trl_lora,
    "complete": rollouts,
    "complete-before": rollouts,
    "generate": rollouts,
    "logprobs": logprobs,
    "limits": limits,
}


# ---- what is printed ----

Rounds = dict[str, list[dict[str, Any]]]  # by arm, a dictionary a round


def of(rounds: Rounds, arm: str, *keys: str) -> list[float]:
    """A measure of an arm, round by round."""
    values: list[Any] = rounds[arm]
    for key in keys:
        values = [value[key] for value in values]
    return values


def megabytes(values: list[float]) -> str:
    return spread([v / 1e6 for v in values], 0)


def compared(rounds: Rounds, *arms: str, keys: tuple[str, ...] = ("seconds",)) -> list[list[str]]:
    """Rows of ratios: the first arm beside each of the others that was run."""
    first, *others = arms
    rows = []
    for other in others:
        if first in rounds and other in rounds:
            quotients = ratios(of(rounds, first, *keys), of(rounds, other, *keys))
            rows.append([f"{NAMES[first]} / {NAMES[other]}", spread(quotients)])
    return rows


def iteration_tables(rounds: Rounds, args: argparse.Namespace) -> list[str]:
    arms = [arm for arm in ("h2s", "before", "trl-prefix", "trl-lora") if arm in rounds]
    if not arms:
        return []
    rows = []
    for arm in arms:
        phases = [spread(of(rounds, arm, phase)) for phase in ("sampling", "scoring", "updates")]
        rate = [args.batch * args.completion / seconds for seconds in of(rounds, arm, "sampling")]
        rows.append([NAMES[arm], spread(of(rounds, arm, "seconds")), *phases, spread(rate, 1)])
        rows[-1].append(megabytes(of(rounds, arm, "bytes")))
    header = [
        "an iteration",
        "seconds",
        "sampling",
        "scoring",
        "updates",
        "rollout tokens/s",
        "peak MB above the model",
    ]
    quotients = compared(rounds, "h2s", "trl-prefix", "trl-lora", "before")
    return [table(header, rows), *([table(["seconds an iteration", "ratio"], quotients)] if quotients else [])]


def rollout_tables(rounds: Rounds, args: argparse.Namespace) -> list[str]:
    if "complete" not in rounds:
        return []
    rows = []
    arms = [arm for arm in ("complete", "complete-before", "generate") if arm in rounds]
    for length in args.prefixes:
        for arm in arms:
            seconds = of(rounds, arm, "whole", str(length), "seconds")
            rate = [args.batch * args.completion / s for s in seconds]
            quotient = spread(ratios(of(rounds, "complete", "whole", str(length), "seconds"), seconds))
            peak = megabytes(of(rounds, arm, "whole", str(length), "bytes"))
            own = arm == "complete"
            rows.append([length, NAMES[arm], spread(seconds), spread(rate, 1), "" if own else quotient, peak])
    header = ["hard prompt, tokens", "rollout", "seconds", "tokens/s", "h2s / this", "peak MB above the model"]
    steps = [[NAMES[arm], *milliseconds(rounds, of(rounds, arm, "step"))] for arm in arms]
    for name, key in (("weights read once", "read"), ("its matrix products alone", "products")):
        steps.append([name, *milliseconds(rounds, of(rounds, "limits", key))])
    step_header = [f"a decode step, {args.batch} rows", "ms", "/ weights read once", "/ products alone"]
    quotients = compared(rounds, "complete", "generate", "complete-before", keys=("step",))
    return [table(header, rows), table(step_header, steps), table(["ms a decode step", "ratio"], quotients)]


def milliseconds(rounds: Rounds, seconds: list[float]) -> list[str]:
    limits = [spread(ratios(seconds, of(rounds, "limits", key))) for key in ("read", "products")]
    return [spread([1000 * s for s in seconds], 1), *limits]


def logprob_tables(rounds: Rounds, args: argparse.Namespace) -> list[str]:
    if "logprobs" not in rounds:
        return []
    alone = of(rounds, "logprobs", "the decoder alone", "bytes")
    rows = []
    for way in ("h2s", "full logits", "the decoder alone"):
        peak = of(rounds, "logprobs", way, "bytes")
        extra = [p - a for p, a in zip(peak, alone, strict=True)]
        seconds = spread(of(rounds, "logprobs", way, "seconds"))
        rows.append([f"(e) {way}", seconds, megabytes(peak), "" if peak is alone else megabytes(extra)])
    header = [
        f"{POSITIONS} positions scored, with gradients",
        "seconds",
        "peak MB above the model",
        "above the decoder's",
    ]
    return [table(header, rows)]


def report(rounds: Rounds, args: argparse.Namespace) -> str:
    """The tables, whatever arms were run."""
    parts = [make(rounds, args) for make in (iteration_tables, rollout_tables, logprob_tables)]
    read, products = (1000 * median(of(rounds, "limits", key)) for key in ("read", "products"))
    limit = f"Limits of a decode step: weights read once {read:.1f} ms, its matrix products alone {products:.1f} ms."
    return "\n\n".join([*(part for made in parts for part in made), limit])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:gemma-3-270m", help="a folder, an embedded: name, or tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="replies an iteration")
    parser.add_argument("--completion", type=int, default=48, help="tokens of a reply")
    parser.add_argument("--prompt", type=int, default=58, help="tokens of a conversation, after the hard prompt")
    parser.add_argument(
        "--prefixes",
        type=int,
        nargs="+",
        default=[50, 500, 2000],
        help="tokens of the hard prompt; a to c, e: the first",
    )
    parser.add_argument("--updates", type=int, default=4, help="of an iteration, each on half of the replies")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", default="abcde", help="some of them, such as ad")
    parser.add_argument("--before", help="the folder of an older checkout of h2s, measured beside this one in a and d")
    args = parser.parse_args(argv)
    if args.batch % 4 or args.updates % MINI_BATCHES or args.completion < 2 or not set(args.arms) <= set(ARMS):
        parser.error("expected --batch in fours, --updates in twos, --completion of 2 or more, --arms of abcde")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    arms = [arm for letter in args.arms for arm in ARMS[letter]] + ["limits"]
    if args.before:
        arms = [
            twin
            for arm in arms
            for twin in {"h2s": (arm, "before"), "complete": (arm, "complete-before")}.get(arm, (arm,))
        ]
    print(measuring.machine(args.threads))
    print(f"- work: {args.model}, {args.batch} replies of {args.completion} tokens to conversations of {args.prompt},")
    print(
        f"  hard prompt of {args.prefixes[0]}, {args.updates} updates; median (least to most) of {args.rounds} rounds"
    )
    children, rounds = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = vars(args) | {"folder": measuring.model_folder(args.model, scratch)}
        try:
            for start in range(0, len(arms), 2):  # two at a time, as they load and warm up
                for arm in arms[start : start + 2]:
                    command = [sys.executable, *child_command(__file__, arm=arm, **settings)]
                    children[arm] = Child(command, args.threads, args.before if "before" in arm else None)
                for arm in arms[start : start + 2]:
                    ready = children[arm].hear()
                    if arm in ("h2s", "before", "complete", "complete-before"):
                        print(f"- {NAMES[arm]}: {ready['checkout']}", flush=True)
            for number in range(args.rounds):
                for arm, child in children.items():
                    rounds.setdefault(arm, []).append(child.ask())
                print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        finally:
            for child in children.values():
                child.end()
    print(f"\n{report(rounds, args)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        as_child(lambda settings: RUN[settings.arm](settings))
    else:
        main()
