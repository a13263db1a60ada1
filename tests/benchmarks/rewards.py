"""What a reward model knows besides length: ways to make one, on the same held-out pairs of a judgement sheet.

    python tests/benchmarks/rewards.py --out outputs/rewards --sheet human_eval.xlsx --members 1 2 3 4 5
    python tests/benchmarks/rewards.py --out outputs/rewards --sheet human_eval.xlsx --members 1 --offset
    python tests/benchmarks/rewards.py --out outputs/rewards --table --beside outputs/rewards-of-another-encoder

Five folds by conversation: every pair is scored by models that never saw its conversation. The settings are those of
`RewardModelConfig`, chosen before; within a fold's other conversations some select the epoch. So no pair that is
reported has chosen anything. A member is a model with a seed of its own (its order of conversations, its prefix and
head at the start). A table of scores is kept for each fold and member: a run that was stopped goes on, and two shells
can share the members out.

- one model: the first member.
- mean: of the members' scores.
- mean minus spread: less the standard deviation over the members of a reply's score.
- length taken out of the scores: less b times the reply's characters, b being the slope of score differences over
  length differences on the pairs that trained.
- length in the loss (`--offset`): b times the difference in characters is added to the score difference while it is
  learnt (TRL's `margin`), b being a logistic regression's of the labels on it. What is left for the model is kept.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import check_same
from scipy.optimize import minimize_scalar

from h2s import RewardModelConfig, RewardModelTrainer, load_preferences
from h2s.data.splits import folds_by_conversation
from h2s.report.accuracy import log_loss, pair_table, right
from h2s.report.intervals import difference_text, share_text
from h2s.reward.encoder import open_encoder, prefix_config
from h2s.reward.pairs import readable_pairs, reply_text

FOLDS, SPLIT_SEED = 5, 42
HUNDRED = 100  # characters: the unit of lengths
NEAR = 25  # characters: pairs that differ by less say little of length
SIDES = ("chosen", "rejected")


def lengths(pairs) -> np.ndarray:
    """Hundreds of characters, chosen minus rejected, (N,)."""
    of = {side: np.array([len(reply_text(reply)) for reply in pairs[side]]) for side in SIDES}
    return (of["chosen"] - of["rejected"]) / HUNDRED


def slope_of_labels(differences: np.ndarray) -> float:
    """b of P(the first is better) = sigmoid(b times the difference in length), by maximum likelihood."""
    return float(minimize_scalar(lambda b: np.logaddexp(0, -b * differences).mean()).x)


def scored(reward, pairs) -> pd.DataFrame:
    """`h2s.report.accuracy`'s pair table, with both scores."""
    table = pair_table(reward, pairs)
    return table.assign(**{side: reward.score(pairs["prompt"], pairs[side]).numpy() for side in SIDES})


def trained(encoder: str, train, validation, folder: Path, seed: int, virtual: int = 20, max_steps: int = -1):
    """A reward model as `recipes/train_reward.py` makes it, of that seed."""
    trainer = RewardModelTrainer(
        model=encoder,
        args=RewardModelConfig(
            output_dir=str(folder),
            seed=seed,
            eval_strategy="epoch",
            bf16=False,  # the same numbers on a card
            report_to="none",
            disable_tqdm=True,
            max_steps=max_steps,
        ),
        train_dataset=train,
        eval_dataset=validation,
        peft_config=prefix_config(virtual),
    )
    trainer.train()
    return trainer.reward_model


def member(settings: argparse.Namespace, seed: int, number: int, parts) -> None:
    """Train on one fold and keep the scores of its held-out pairs, and the two slopes."""
    name = f"{'offset' if settings.offset else 'member'}-{seed}"
    folder = settings.out / name / str(number)
    if (folder / "slopes.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    slopes, train, validation = {}, parts["train"], parts["validation"]
    if settings.offset:
        slopes["labels"] = b = slope_of_labels(lengths(train))
        # TRL's loss subtracts the margin from the score difference.
        train, validation = (part.add_column("margin", (-b * lengths(part)).tolist()) for part in (train, validation))
    model = trained(
        settings.encoder, train, validation, folder / "run", seed, settings.num_virtual_tokens, settings.max_steps
    )
    learnt, characters = pair_table(model, parts["train"]), lengths(parts["train"])
    # Through the origin: which reply stands first is nothing that a length could explain.
    slopes["scores"] = float(characters @ learnt["margin"] / (characters @ characters))
    scored(model, parts["test"]).to_parquet(folder / "pairs.parquet")
    shutil.rmtree(folder / "run")
    (folder / "slopes.json").write_text(json.dumps(slopes), encoding="utf-8")  # last: the fold is whole
    print(f"{name}, fold {number}: right in {right(learnt['margin']).mean():.3f} of the pairs that trained", flush=True)


def margins(out: Path) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The held-out pairs in one order, and each way's score differences on them."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for folder in sorted(out.glob("*-*"), key=lambda f: (f.name.split("-")[0], int(f.name.split("-")[1]))):
        folds = sorted(folder.glob("*/slopes.json"))
        if len(folds) == FOLDS:
            read = [
                pd.read_parquet(f.parent / "pairs.parquet").assign(slope=json.loads(f.read_text())["scores"])
                for f in folds
            ]
            tables.setdefault(folder.name.split("-")[0], []).append(pd.concat(read, ignore_index=True))
    members, offset = tables.get("member", []), tables.get("offset", [])
    if not members + offset:
        raise SystemExit(f"no way has all {FOLDS} folds yet in {out}")
    first = (members or offset)[0]
    characters = first["length_difference"].to_numpy() / HUNDRED
    ways = {"the longer wins": first["length_difference"].to_numpy(dtype=float)}
    for number, table in enumerate(members, start=1):
        ways[f"one model, seed {number}"] = table["margin"].to_numpy()
    if members:
        alone = members[0]["margin"] - members[0]["slope"] * characters
        ways["length taken out of the first's scores"] = alone.to_numpy()
    if len(members) > 1:
        scores = {side: np.stack([table[side] for table in members]) for side in SIDES}  # (members, N)
        mean = {side: of.mean(0) for side, of in scores.items()}
        safe = {side: of.mean(0) - of.std(0, ddof=1) for side, of in scores.items()}
        ways[f"mean of {len(members)}"] = mean["chosen"] - mean["rejected"]
        ways[f"mean minus spread of {len(members)}"] = safe["chosen"] - safe["rejected"]
        slope = np.mean([table["slope"] for table in members], axis=0)
        ways[f"length taken out of the mean of {len(members)}"] = mean["chosen"] - mean["rejected"] - slope * characters
    for table in offset:
        ways["length in the loss, what is left"] = table["margin"].to_numpy()
    return first, ways


def table(out: Path, beside: Path | None = None) -> str:
    """Markdown: a row a way, then paired differences; with `beside` those to the same ways there."""
    pairs, ways = margins(out)
    conversations, longer = pairs["conversation"].to_numpy(), right(pairs["length_difference"]).to_numpy()
    near = (pairs["length_difference"].abs() < NEAR).to_numpy()
    unequal = (pairs["length_difference"] != 0).to_numpy()
    lines = [
        f"| on {len(pairs)} held-out pairs, {len(set(conversations))} conversations | right | minus the longer wins "
        f"| right where lengths differ by less than {NEAR} characters | sides with the longer | log loss, nats |",
        "|---" * 6 + "|",
    ]
    for name, margin in ways.items():
        is_right = right(margin).to_numpy()
        of_length = name == "the longer wins"
        cells = [
            name,
            share_text(is_right, conversations),
            "-" if of_length else difference_text(is_right - longer, conversations),
            share_text(is_right[near], conversations[near]),
            f"{(np.sign(margin) == np.sign(pairs['length_difference']))[unequal].mean():.2f}",
            "-" if of_length else f"{log_loss(pairs.assign(margin=margin)):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    here, there = rights(ways), {}
    if beside is not None:
        others, ways_there = margins(beside)
        if others[["conversation", "row"]].values.tolist() != pairs[["conversation", "row"]].values.tolist():
            raise SystemExit(f"{beside} holds other pairs than {out}")
        there = rights(ways_there)
    names = list(here)
    compared = [(f"{a} minus {b}", here[a] - here[b]) for a, b in zip(names[1:], names, strict=False)]
    compared += [(f"{a}, here minus {beside}", here[a] - there[a]) for a in names[1:] if a in there]
    return "\n".join([*lines, "", *(f"- {name}: {difference_text(d, conversations)}" for name, d in compared)])


def rights(ways: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whether a pair is right, (N,), by length, by one model on average over the seeds, and by the ensembles."""
    hits = {name: right(margin).to_numpy() for name, margin in ways.items()}
    alone = [of for name, of in hits.items() if name.startswith("one model")]
    groups = {"the longer wins": hits["the longer wins"]}
    if alone:
        groups["one model on average"] = np.mean(alone, axis=0)
    return groups | {name: of for name, of in hits.items() if name.startswith("mean ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the scores; a run that was stopped goes on")
    parser.add_argument("--sheet", help="the judgements")
    parser.add_argument("--encoder", default="embedded:minilm")
    parser.add_argument("--num_virtual_tokens", type=int, default=20)
    parser.add_argument("--members", type=int, nargs="+", default=[1], help="seeds, a model each")
    parser.add_argument("--offset", action="store_true", help="length in the loss")
    parser.add_argument("--max_steps", type=int, default=-1, help="for a look at whether it runs")
    parser.add_argument("--table", action="store_true", help="print what is there and do nothing")
    parser.add_argument("--beside", type=Path, help="of the table: the folder of another encoder, to compare with")
    settings = parser.parse_args()
    if not settings.table:
        settings.out.mkdir(parents=True, exist_ok=True)
        shared = ("sheet", "encoder", "num_virtual_tokens", "max_steps")
        check_same(settings.out / "settings.json", {name: str(getattr(settings, name)) for name in shared})
        _, tokenizer, max_tokens = open_encoder(settings.encoder, settings.num_virtual_tokens)
        pairs = readable_pairs(load_preferences(settings.sheet), tokenizer, max_tokens)
        for seed in settings.members:
            for number, parts in enumerate(folds_by_conversation(pairs, FOLDS, SPLIT_SEED), start=1):
                member(settings, seed, number, parts)
    print(table(settings.out, settings.beside))


if __name__ == "__main__":
    main()
