"""How seconds and peak memory of an h2s iteration grow, and what memory Gemma 3 needs on a card.

    python tests/benchmarks/growth.py
    python tests/benchmarks/growth.py --model tiny --quick    # a quick look: its figures say nothing

One variable at a time around one centre, each point in a process of its own: a short iteration unmeasured, then
`--rounds` measured ones. Two processes are launched by `accelerate launch`, with one thread each, and share the batch
of the one that they stand beside.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import measuring
import numpy as np
from accelerate import PartialState
from measuring import MINI_BATCHES, Child, Iterations, as_child, child_command, spread, table, tell

from h2s.prefix.generation import VOCABULARY_CHUNK

CENTRE = {"batch": 4, "completion": 16, "prompt": 50, "prefix": 20}
VALUES = {"batch": [4, 8, 16], "completion": [16, 48, 128], "prompt": [50, 500, 2000], "prefix": [20, 200, 1000]}
QUICK = {"batch": [4, 8, 16], "completion": [4, 8, 16], "prompt": [20, 30, 40], "prefix": [20, 40, 60]}
UPDATES = 2
LINEAR = (0.75, 1.33)  # two slopes whose ratio lies between these are called one line
FLOAT = 4  # bytes


# ---- the memory of a run ----


@dataclass(frozen=True)
class Shape:
    """A Gemma 3 text model, as its published configuration has it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """The output head is the embedding: it is counted once."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        norms = 4 * self.hidden + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + norms
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden

    @property
    def cached(self) -> int:
        """Numbers that keys and values of one position are."""
        return self.layers * 2 * self.kv_heads * self.head_dim


SHAPES = {
    "Gemma 3 270M": Shape(18, 640, 2048, 4, 1, 256, 262_144),
    "Gemma 3 1B": Shape(26, 1152, 6912, 4, 1, 256, 262_144),
    "Gemma 3 4B": Shape(34, 2560, 10240, 8, 4, 256, 262_208),
    "Gemma 3 12B": Shape(48, 3840, 15360, 16, 8, 256, 262_208),
    "Gemma 3 27B": Shape(62, 5376, 21504, 32, 16, 128, 262_208),
}


def memory(
    shape: Shape, batch: int, rows: int, prefix: int, prompt: int, completion: int, number: int
) -> dict[str, float]:
    """The bytes that an h2s iteration needs on one device, by what they are for.

    The peak is `held` and the larger of `rollout` and `update`, which are not there at the same time. Left out: what
    the allocator keeps besides, the libraries' own, the decoder's passing tensors, and the image encoder, which 4B and
    up load too (0.42e9 parameters).

    Args:
        shape: of the model.
        batch: replies that are drawn together.
        rows: replies of a mini-batch.
        prefix: P, tokens of the hard prompt.
        prompt: T, tokens of the longest conversation after it.
        completion: C, most tokens of a reply.
        number: bytes of a number of the frozen model, 2 in bfloat16.
    """
    s, text = shape, prompt + completion
    # The soft prefix, its gradient and Adam's two moments, the frozen hard prompt; float32.
    prefixes = 5 * prefix * s.cached * FLOAT
    # Two linear layers, their gradients and two moments; float32.
    value_head = 4 * (s.hidden**2 + 3 * s.hidden + 1) * FLOAT
    # h2s keeps all positions in the sliding layers too.
    cache = batch * (prefix + text) * s.cached * number
    # A step's logits, their float32 copy, and what sampling makes of them: probabilities and two in between.
    logits = batch * s.vocabulary * (number + 4 * FLOAT)
    # What autograd keeps of a layer, a position. Weights are frozen, so linear layers keep nothing; norms keep their
    # inputs in float32; attention keeps queries, keys, values and its output; the MLP gate, its activation, and up.
    norms = (4 * s.hidden + (s.heads + s.kv_heads) * s.head_dim) * FLOAT
    attention = 2 * s.heads * s.head_dim * number
    mlp = 3 * s.intermediate * number
    activations = rows * text * s.layers * (norms + attention + mlp)
    activations += rows * (prefix + text) * s.cached * number  # keys and values, of the prefix too
    masks = rows * text * (prefix + text) * s.layers * number
    # VOCABULARY_CHUNK columns of logits for N positions, and three more of their size; hidden states and gradient.
    head = rows * completion * (4 * VOCABULARY_CHUNK + 2 * s.hidden) * FLOAT
    return {
        "weights": s.parameters * number,
        "prefixes": prefixes,
        "value head": value_head,
        "cache": cache,
        "logits": logits,
        "activations": activations,
        "masks": masks,
        "head": head,
        "held": s.parameters * number + prefixes + value_head,
        "rollout": cache + logits,
        "update": activations + masks + head,
    }


def peak(bytes_by_term: dict[str, float]) -> float:
    return bytes_by_term["held"] + max(bytes_by_term["rollout"], bytes_by_term["update"])


# ---- a point, in its process ----


def point(s: SimpleNamespace) -> None:
    base, tokenizer = measuring.load(s.folder)
    policy = measuring.policy_of(base, tokenizer, s.prefix)
    batch = s.batch // s.processes
    measured: list[dict[str, float]] = []
    callback = Iterations(base, 1, before=lambda: None, after=measured.append)
    contexts = measuring.contexts_of(policy, s.batch, s.prompt)
    with tempfile.TemporaryDirectory() as folder:
        short = measuring.contexts_of(policy, s.batch, 20)
        measuring.ppo_trainer(policy, short, batch, 2, UPDATES, 1, f"{folder}/short").train()
        measuring.ppo_trainer(
            policy, contexts, batch, s.completion, UPDATES, s.rounds, f"{folder}/measured", [callback]
        ).train()
    if PartialState().is_main_process:
        tell(rounds=measured, processes=PartialState().num_processes)


def measure(settings: dict[str, Any]) -> list[dict[str, float]]:
    command, processes = child_command(__file__, **settings), settings["processes"]
    if processes > 1:
        config = str(measuring.ROOT / "accelerate_configs" / "cpu.yaml")
        launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
        command = [*launch, *command]
    child = Child([sys.executable, *command], settings["threads"])
    told = child.hear()
    child.end()
    assert told["processes"] == processes, told["processes"]
    return told["rounds"]


# ---- what is printed ----


def slopes(x: list[float], y: list[float]) -> tuple[float, float]:
    """The slope of a line through all points, and the second section's slope over the first's."""
    first, second = ((y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in (0, 1))
    return float(np.polyfit(x, y, 1)[0]), second / first if first else float("inf")


def called(ratio: float) -> str:
    low, high = LINEAR
    return "linear" if low <= ratio <= high else "slower than linear" if ratio < low else "faster than linear"


def card_table(batch: int, rows: int, prefix: int, prompt: int, completion: int) -> str:
    terms = ["weights", "prefixes", "value head", "cache", "logits", "activations", "masks", "head"]
    lines = []
    for name, shape in SHAPES.items():
        needed = memory(shape, batch, rows, prefix, prompt, completion, number=2)
        lines.append([name, *(f"{needed[term] / 1e9:.2f}" for term in terms), f"{peak(needed) / 1e9:.1f}"])
    return table(["bfloat16, GB", *terms, "peak"], lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:gemma-3-270m", help="a folder, an embedded: name, or tiny")
    parser.add_argument("--rounds", type=int, default=2, help="measured iterations a point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small values")
    parser.add_argument("--variables", nargs="+", choices=[*VALUES, "processes"], default=[*VALUES, "processes"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    values = QUICK if args.quick else VALUES
    centre = {name: values[name][0] for name in CENTRE}
    print(measuring.machine(args.threads))
    print(f"- h2s: {measuring.checkout()}")
    print(f"- work: {args.model}; around {centre}, {UPDATES} updates on half of the replies each")
    print(f"- seconds: median (least to most) of {args.rounds} iterations", flush=True)
    points = [(name, v, {**centre, name: v, "processes": 1}) for name in values for v in values[name]]
    both = {**centre, "batch": values["batch"][1], "threads": 1}
    points += [("processes", n, {**both, "processes": n}) for n in (1, 2)]
    points = [p for p in points if p[0] in args.variables]
    known, rows, growth = {}, [], []
    shape = SHAPES["Gemma 3 270M"] if args.model == "embedded:gemma-3-270m" else None
    with tempfile.TemporaryDirectory() as scratch:
        common = {"folder": measuring.model_folder(args.model, scratch), "rounds": args.rounds, "threads": args.threads}
        for name, value, changed in points:
            settings = common | changed
            key = str(sorted(settings.items()))
            if key not in known:
                known[key] = measure(settings)
                print(f"{name} {value} measured", file=sys.stderr, flush=True)
            seconds = [m["seconds"] for m in known[key]]
            highest = max(m["bytes"] for m in known[key])
            rows.append([name, value, spread(seconds), f"{highest / 1e6:.0f}"])
            growth.append((name, value, median(seconds), highest))
            if shape is not None:
                share = settings["batch"] // settings["processes"]
                sizes = [settings[n] for n in ("prefix", "prompt", "completion")]
                needed = memory(shape, share, -(-share // MINI_BATCHES), *sizes, number=FLOAT)
                expected = peak(needed) - needed["weights"]
                rows[-1] += [f"{expected / 1e6:.0f}", f"{highest / expected:.2f}"]
    predicted = ["predicted MB", "measured / predicted"] if shape is not None else []
    print("\n" + table(["variable", "value", "seconds an iteration", "peak MB above the model", *predicted], rows))
    lines = []
    for name in (n for n in values if n in args.variables):
        x, seconds, highest = (list(column) for column in zip(*(g[1:] for g in growth if g[0] == name), strict=True))
        for what, y, scale, digits in (("ms", seconds, 1e3, 1), ("MB", highest, 1e-6, 2)):
            slope, ratio = slopes(x, y)
            lines.append([name, what, f"{slope * scale:.{digits}f}", f"{ratio:.2f}", called(ratio)])
    print("\n" + table(["variable", "of", "a unit", "second slope / first", "growth"], lines))
    work = {"batch": 16, "rows": 4, "prefix": 200, "prompt": 500, "completion": 128}
    print(f"\nBy the formula (`memory`), for {work}:\n\n{card_table(**work)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        as_child(point)
    else:
        main()
