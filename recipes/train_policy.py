"""Stage 2: move the soft prefix toward what the reward model prefers, by single-step PPO.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_policy.py \
        --config recipes/embedded/policy.yaml --reward_adapter outputs/reward
"""

import logging

from h2s.run import arguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")

DEFAULTS = {"eval_strategy": "steps"}  # there always are contexts that select


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(
        arguments.PolicyModelArguments, arguments.PolicyDatasetArguments, "h2s:SingleStepPPOConfig", argv, **DEFAULTS
    )
    # Here, not above: they take seconds to import, and what is wrong with the recipe's file has been told by now.
    from h2s import PrefixTuningPolicyModel, SingleStepPPOTrainer, load_contexts
    from h2s.data import splits
    from h2s.prefix.opened import open_policy
    from h2s.report.comparison import write_comparison
    from h2s.report.what_changed import layer_movement, write_what_changed
    from h2s.reward.functions import open_scorers

    ########
    # Data #
    ########
    contexts = load_contexts(data_args.require("path", "dataset"))
    opened = open_policy(model_args, model_args.prefix_adapter, question_prefix=data_args.question_prefix)
    model_args.check_reward()
    scorers = open_scorers(model_args.reward_adapter, model_args.judge_adapter, model_args.reward_function)
    opened.encode(contexts, args.compared_completion_length)  # each can be answered
    parts = splits.split_by_conversation(contexts, data_args.split_seed, data_args.test_size)
    seen_by = {"policy": opened.prefix.seen} | {name: scorer.seen for name, scorer in scorers.items()}
    parts["test"], aside = splits.set_aside_seen(parts["test"], seen_by)
    SingleStepPPOTrainer.check(args, parts["train"], parts["validation"], scorers)
    run.check_push(args, opened.source)

    #########
    # Model #
    #########
    folder = run.start(model_args, data_args, args, resume=args.resume_from_checkpoint, **DEFAULTS)
    args.output_dir = str(folder)
    args.push_to_hub = False  # at the end, with the report
    logger.info("contexts that train %d, select %d, are reported %d", *(len(p) for p in parts.values()))
    logger.info("for the report %s", aside)
    splits.warn_of_few(parts["test"], parts["validation"])
    policy = PrefixTuningPolicyModel.load(opened, model_args.dtype, model_args.attn_implementation, args.device)

    ############
    # Training #
    ############
    trainer = SingleStepPPOTrainer(
        model=policy,
        reward_funcs=scorers["reward"],
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        judge=scorers.get("judge"),
        callbacks=run.callbacks(),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_state()

    ##########
    # Report #
    ##########
    table, names = trainer.compare(parts["test"]), list(scorers)
    moved = layer_movement(policy.model)
    if not run.is_main_process:
        return
    measured = f"{write_comparison(table, names, folder, trainer.kept_step())}\n{aside}"
    logger.info("%s", measured)
    if "judge" in scorers:
        logger.info("(the reward is the one that was trained on: it shows movement, not what people like)")
    for name, scorer in trainer.scorers.items():
        if cuts := scorer.cuts():
            logger.info("the %s cut %d contexts, %d responses", name, cuts["context"], cuts["response"])
    logger.info("side by side, and how far each layer moved: %s", write_what_changed(table, moved, names, folder))
    policy.write_card(folder, measured)  # the adapter lies there already
    logger.info("the adapter of the kept step is in %s", folder)
    run.push(args)


if __name__ == "__main__":
    main()
