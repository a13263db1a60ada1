"""Stage 1: learn the judgements of a sheet as a BERT + prefix reward model.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_reward.py \
        --config recipes/embedded/reward.yaml
"""

from collections import Counter

from transformers import set_seed
from trl import RewardTrainer

from h2s.arguments import DatasetArguments, RewardModelArguments, need, parse_recipe, write_recipe
from h2s.callbacks import DropPickledArguments, PrefixGradientCheck, ReadableLog, SelectByAccuracy
from h2s.contexts import split_by_conversation
from h2s.errors import exits_on_bad_input
from h2s.evaluation import interval_text
from h2s.model_card import push, write_card
from h2s.preferences import load_preferences
from h2s.prefix import load_config, load_tokenizer, load_weights, model_source
from h2s.reward_model import (
    PreferenceCollator,
    RewardModel,
    RewardModelConfig,
    build_reward_model,
    check_encoder,
    max_text_tokens,
    tokenize_preferences,
)
from h2s.run_folder import claim, logger, newest_checkpoint, start_log


@exits_on_bad_input
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(RewardModelArguments, DatasetArguments, RewardModelConfig, argv)

    ########
    # Data #
    ########
    preferences = load_preferences(need(data_args.path, "path", "dataset"))
    parts = split_by_conversation(preferences.dataset, data_args.split_seed, data_args.test_size)

    #########
    # Model #
    #########
    name = need(model_args.reward_model_name_or_path, "reward_model_name_or_path", "model")
    source = model_source(name)
    tokenizer, config = load_tokenizer(source), load_config(source)
    check_encoder(config, tokenizer, name)
    max_tokens = max_text_tokens(config, model_args.num_virtual_tokens, model_args.max_tokens)
    folder = claim(args.output_dir, args.run_name, args.resume_from_checkpoint)
    start_log(folder)
    if args.should_save:
        write_recipe(folder / "recipe.yaml", model_args, data_args, args)
    args.output_dir = str(folder)
    push_to_hub, args.push_to_hub = args.push_to_hub, False  # ours pushes by allow-list, at the end
    logger.info("%s", preferences.summary())
    logger.info("pairs that train %d, select %d, are reported %d", *(len(p) for p in parts.values()))

    ############
    # Training #
    ############
    set_seed(args.seed)
    model = build_reward_model(source, model_args.num_virtual_tokens)
    cuts: Counter = Counter()
    tokenized = {p: tokenize_preferences(parts[p], tokenizer, max_tokens, cuts) for p in ("train", "validation")}
    trainer = RewardTrainer(
        model=model,
        args=args,
        data_collator=PreferenceCollator(tokenizer),
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        callbacks=[PrefixGradientCheck(), SelectByAccuracy(), ReadableLog(), DropPickledArguments()],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder) if args.resume_from_checkpoint else None)
    best = trainer.state.best_model_checkpoint
    if best is not None:
        load_weights(model, best)
        logger.info("best epoch by validation accuracy: %s (%.3f; ties by loss)", best, trainer.state.best_metric)

    ##########
    # Report #
    ##########
    if not trainer.is_world_process_zero():
        return
    reward = RewardModel(model, tokenizer, max_tokens)
    test = parts["test"]
    chosen = reward.score(test["prompt"], test["chosen"], "scoring")
    rejected = reward.score(test["prompt"], test["rejected"], "scoring")
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected)
    longer = [
        (len(c) > len(r)) + 0.5 * (len(c) == len(r)) for c, r in zip(test["chosen"], test["rejected"], strict=True)
    ]
    accuracy = interval_text(right.tolist(), test["conversation"])
    baseline = interval_text(longer, test["conversation"])
    logger.info("accuracy on held-out conversations: %s", accuracy)
    logger.info("baseline, the longer response wins: %s", baseline)
    logger.info("cut to %d tokens: %d contexts, %d responses", max_tokens, cuts["context"], cuts["response"])
    reward.save(folder)
    body = (
        f"Scores a response to a context; trained on human A/B judgements with the pairwise logistic loss.\n\n"
        f"| on held-out conversations | accuracy, 95% interval |\n|---|---|\n| this model | {accuracy} |\n"
        f"| the longer response wins | {baseline} |"
    )
    write_card(folder, "A BERT + prefix reward model", source, body, reward=True)
    logger.info("saved to %s", folder)
    if push_to_hub:
        logger.info("pushed to %s", push(folder, args.hub_model_id, args.hub_private_repo, args.hub_token))


if __name__ == "__main__":
    main()
