"""The judgements straight into the soft prefix, by TRL's DPO: one stage, no reward.

accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_dpo.py --config recipes/embedded/dpo.yaml
"""

import logging

from h2s.run import arguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")

DEFAULTS = {"eval_strategy": "steps"}  # there always are pairs that select


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(
        arguments.TrainedPolicyArguments, arguments.DPODatasetArguments, "h2s:PrefixDPOConfig", argv, **DEFAULTS
    )
    # Here, not above: they take seconds to import, and what is wrong with the recipe's file has been told by now.
    from datasets import disable_progress_bars

    from h2s import PrefixDPOTrainer, PrefixTuningPolicyModel
    from h2s.data import splits
    from h2s.data.datasets import read_judgements
    from h2s.prefix.opened import open_policy
    from h2s.report import accuracy, comparison, what_changed
    from h2s.reward.functions import open_scorers

    disable_progress_bars()  # TRL tokenizes in a second

    ########
    # Data #
    ########
    path, form = data_args.require("path", "dataset"), (data_args.sheet, data_args.columns, data_args.labels)
    judgements = read_judgements(path, True, *form, data_args.encoding)
    opened = open_policy(model_args, model_args.prefix_adapter, question_prefix=data_args.question_prefix)
    scorers = open_scorers(judge_adapter=model_args.judge_adapter)
    parts = splits.split_by_conversation(judgements.dataset, data_args.split_seed, data_args.test_size)
    judged = {name: scorer.seen for name, scorer in scorers.items()}
    # The judge learnt from the same people: what it knows of a conversation, the policy shall not learn.
    train, aside = splits.set_aside_seen(parts["train"], judged, "to train on", "judgements")
    validation, _ = splits.set_aside_seen(parts["validation"], judged, "to select by", "judgements")
    test, unseen = splits.set_aside_seen(parts["test"], {"policy": opened.prefix.seen, **judged}, rows="judgements")
    PrefixDPOTrainer.check(args, opened, train, validation)
    PrefixDPOTrainer.check(args, opened, test)
    opened.encode(test, args.max_completion_length)  # each can be answered
    run.check_push(args, opened.source)

    #########
    # Model #
    #########
    folder = run.start(model_args, data_args, args, resume=args.resume_from_checkpoint, **DEFAULTS)
    args.output_dir = str(folder)
    args.push_to_hub = False  # at the end, with the report
    logger.info("%s\n%s", judgements.summary(), accuracy.sheet_report(judgements))
    logger.info("pairs that train %d, select %d, are reported %d", len(train), len(validation), len(test))
    if scorers:
        logger.info("for training %s", aside)
    logger.info("for the report %s", unseen)
    splits.warn_of_few(test, validation)
    policy = PrefixTuningPolicyModel.load(opened, model_args.dtype, model_args.attn_implementation, args.device)

    ############
    # Training #
    ############
    trainer = PrefixDPOTrainer(
        model=policy, args=args, train_dataset=train, eval_dataset=validation, callbacks=run.callbacks()
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_state()

    ##########
    # Report #
    ##########
    table, names = trainer.compare(test, scorers), list(scorers)
    moved = what_changed.layer_movement(policy.model)
    if not run.is_main_process:
        return
    learnt = accuracy.write_accuracy(trainer.implicit_reward, test, judgements, folder)
    measured = f"{comparison.write_comparison(table, names, folder, trainer.kept_step())}\n{unseen}"
    logger.info("what it answers, soft beside hard: %s", measured)
    logger.info("what it prefers (%s): %s", accuracy.ACCURACY_REPORT, learnt.split("\n\n")[0])
    for scorer in scorers.values():
        if cuts := scorer.cuts():
            logger.info("the judge cut %d contexts, %d responses", cuts["context"], cuts["response"])
    logger.info("side by side: %s", what_changed.write_what_changed(table, moved, names, folder))
    policy.write_card(folder, f"{measured}\n\n{learnt}")  # the adapter lies there already
    logger.info("the adapter of the kept step is in %s; compare.py has its dial and a sheet for people", folder)
    run.push(args)


if __name__ == "__main__":
    main()
