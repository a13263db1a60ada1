"""Stage 1: learn the judgements of a sheet as a reward model, an encoder with a prefix.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_reward.py \
        --config recipes/embedded/reward.yaml
"""

import logging
from pathlib import Path

from h2s.run import arguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")

DEFAULTS = {"eval_strategy": "epoch"}  # there always are pairs that select


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(
        arguments.RewardModelArguments,
        arguments.RewardDatasetArguments,
        "h2s.reward.config:TaskArguments",
        argv,
        **DEFAULTS,
    )
    # Here, not above: they take seconds to import, and what is wrong with the recipe's file has been told by now.
    from h2s import RewardModelTrainer
    from h2s.data import splits
    from h2s.data.datasets import read_judgements
    from h2s.report.accuracy import cross_validate, sheet_report, write_accuracy
    from h2s.reward import encoder
    from h2s.reward.pairs import readable_pairs

    ########
    # Data #
    ########
    path, form = data_args.require("path", "dataset"), (data_args.sheet, data_args.columns, data_args.labels)
    judgements = read_judgements(path, True, *form, data_args.encoding)
    name = model_args.require("reward_model_name_or_path", "model")
    prefix = encoder.prefix_config(model_args.num_virtual_tokens)
    source, tokenizer, args.max_tokens = encoder.open_encoder(name, prefix.num_virtual_tokens, model_args.max_tokens)
    pairs, seed = readable_pairs(judgements.dataset, tokenizer, args.max_tokens), data_args.split_seed
    roles = splits.split_for_models(pairs, seed, data_args.test_size, data_args.judge_share)
    folds = [] if data_args.folds is None else splits.folds_by_conversation(pairs, data_args.folds, seed)
    run.check_push(args, source, *(role for role in roles if role != "reward"))
    folder = run.start(model_args, data_args, args, resume=args.resume_from_checkpoint, **DEFAULTS)
    args.push_to_hub = False  # at the end, with the report
    logger.info("%s\n%s", judgements.summary(), sheet_report(judgements))

    ############
    # Training #
    ############
    def trained(parts, where: Path) -> RewardModelTrainer:
        args.output_dir = str(where)
        trainer = RewardModelTrainer(
            model=source,
            args=args,
            train_dataset=parts["train"],
            eval_dataset=parts["validation"],
            peft_config=prefix,
            callbacks=run.callbacks(),
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        return trainer

    scored = None
    if folds:
        scored = cross_validate(lambda *of: trained(*of).reward_model, folds, folder, run.is_main_process)
    for role, parts in roles.items():
        where = folder if role == "reward" else folder / role
        logger.info("%s: pairs that train %d, select %d, are reported %d", role, *(len(p) for p in parts.values()))
        splits.warn_of_few(parts["test"] if scored is None or role == "judge" else pairs, parts["validation"])
        trainer = trained(parts, where)

        ##########
        # Report #
        ##########
        if not run.is_main_process:
            continue
        of_sheet = scored if role == "reward" else None
        text = write_accuracy(trainer.reward_model, parts["test"], judgements, where, of_sheet, len(folds))
        logger.info("%s: %s", role, text)
        trainer.reward_model.save_pretrained(where, f"{text}\n\nThis is the {role} model of its run.")
        logger.info("saved to %s", where)
    if run.is_main_process:
        run.push(args)


if __name__ == "__main__":
    main()
