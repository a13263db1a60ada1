"""Soft and hard side by side on held-out contexts: scores with intervals, and a blinded sheet for people to judge.

python recipes/compare.py --config recipes/embedded/compare.yaml --policy_adapter outputs/policy
python recipes/compare.py --judged anna.xlsx ben.xlsx
"""

import logging

from h2s.run import arguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(
        arguments.CompareModelArguments, arguments.CompareDatasetArguments, arguments.CompareArguments, argv
    )
    # Here, not above: they take seconds to import, and what is wrong with the settings has been told by now.
    from h2s import PrefixTuningPolicyModel, load_contexts
    from h2s.data import splits
    from h2s.prefix.generation import Sampling
    from h2s.report import blinded_sheet, strengths
    from h2s.report.best_of_n import yardstick
    from h2s.report.comparison import write_comparison
    from h2s.reward.functions import open_scorers

    if data_args.judged:
        print(blinded_sheet.people_verdict(data_args.judged))
        return

    ########
    # Data #
    ########
    contexts = load_contexts(data_args.require("path", "dataset"))
    opened = PrefixTuningPolicyModel.open(model_args.require("policy_adapter", "model"))
    opened = opened.with_question_prefix(data_args.question_prefix)
    blinded_sheet.check_fits_cells(contexts)
    opened.encode(contexts, args.max_completion_length)  # each can be answered
    if data_args.split == "test":
        contexts = splits.split_by_conversation(contexts, data_args.split_seed, data_args.test_size)["test"]
    scorers = open_scorers(model_args.reward_adapter, model_args.judge_adapter)
    seen_by = {"policy": opened.prefix.seen} | {name: scorer.seen for name, scorer in scorers.items()}
    contexts, aside = splits.set_aside_seen(contexts, seen_by)
    splits.warn_of_few(contexts)
    drawn = (
        f"Temperature {args.temperature:g}, seed {args.seed} (where train_policy.py had both, its report's replies)."
    )
    which = f"{drawn} {data_args.which_contexts()} {aside}"

    ###########
    # Compare #
    ###########
    folder = run.start(model_args, data_args, args)
    policy = PrefixTuningPolicyModel.load(opened)
    sampling = Sampling(args.max_completion_length, args.temperature, args.top_k, args.top_p)
    tables = strengths.along(policy, contexts, scorers, sampling, args.strengths, args.batch_size, args.seed)
    table, best = tables[1], ""
    if scorers and args.best_of_n and args.temperature:  # without chance all draws are one
        best = yardstick(table, policy, contexts, scorers, sampling, args.best_of_n, args.batch_size, args.seed)

    ##########
    # Report #
    ##########
    if not run.is_main_process:
        return
    parts = [f"{write_comparison(table, list(scorers), folder)}\n{which}", best]
    parts += [strengths.write_strengths(tables, list(scorers), folder)] if len(tables) > 1 else []
    text = "\n\n".join(part for part in parts if part)
    logger.info("%s", text)
    pictures = "".join(f"\n\n![]({file.name})" for file in sorted(folder.glob("*.png")))
    (folder / "README.md").write_text(f"# Soft against hard\n\n{text}{pictures}\n", encoding="utf-8")
    table.to_parquet(folder / "replies.parquet")
    sheet, key, rows = blinded_sheet.write_blinded_sheet(table, folder, args.seed, args.language)
    logger.info("to be judged: %s (%s); send each person a copy and keep %s: it tells the sides", sheet, rows, key.name)
    logger.info("people's verdict, once copies are back beside it: compare.py --judged COPY [COPY ...]")
    if data_args.split == "test":
        logger.info("to learn from it, take another split_seed in every recipe: this one holds its contexts out")


if __name__ == "__main__":
    main()
