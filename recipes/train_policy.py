"""Stage 2: move the soft prefix toward what the reward model prefers, by single-step PPO.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_policy.py \
        --config recipes/embedded/policy.yaml --reward_adapter outputs/reward
"""

from peft import TaskType
from transformers import set_seed

from h2s.data.datasets import load_contexts
from h2s.data.splits import split_by_conversation
from h2s.errors import InputError
from h2s.hub import adapter_folder, push_adapter, write_card
from h2s.models import load_base_model, load_config, load_tokenizer, model_source, room_for_text
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.policy import PolicyWithValueHead
from h2s.ppo.trainer import SingleStepPPOTrainer, check_metric
from h2s.prefix.adapter import add_hard_prompt, load_weights, prefix_from_hard_prompt, read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, encode_prompts, wrap_chat_template
from h2s.report.soft_vs_hard import (
    DIFFERENCES_PICTURE,
    WHAT_CHANGED,
    add_scores,
    answer_both,
    picture,
    report,
    what_changed,
)
from h2s.reward.functions import RewardFunction, load_reward_function
from h2s.reward.model import RewardModel, scorer_adapters
from h2s.run.arguments import DatasetArguments, PolicyModelArguments, read_hard_prompt, require_setting
from h2s.run.checkpoints import ReadableLog, checkpoint_to_resume
from h2s.run.folder import create_run_folder, logger, reports_errors, start_log
from h2s.run.recipe import parse_recipe, write_recipe


def find_prefix(arguments: PolicyModelArguments):
    """Base model, revision, its tokenizer with the wrapped template, and the prefix: from a prompt or an adapter."""
    if arguments.prefix_adapter is None:
        prompt = read_hard_prompt(arguments)
        source = model_source(require_setting(arguments.model_name_or_path, "model_name_or_path", "model"))
        tokenizer = load_tokenizer(source, arguments.model_revision)
        prefix = chat_prefix(tokenizer, prompt, arguments.opening_user_message)
        wrap_chat_template(tokenizer, prefix)
        return source, arguments.model_revision, tokenizer, prefix
    for key in ("model_name_or_path", "hard_prompt", "hard_prompt_file", "opening_user_message"):
        if getattr(arguments, key) is not None:
            raise InputError(f"prefix_adapter brings its own {key}: leave {key} out")
    folder = adapter_folder(arguments.prefix_adapter)
    config = read_adapter_config(folder, TaskType.CAUSAL_LM)
    return config.base_model_name_or_path, config.revision, load_tokenizer(folder), ChatPrefix.load(folder)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(PolicyModelArguments, DatasetArguments, SingleStepPPOConfig, argv)

    ########
    # Data #
    ########
    contexts = load_contexts(require_setting(data_args.path, "path", "dataset"))
    source, revision, tokenizer, prefix = find_prefix(model_args)
    if (model_args.reward_adapter is None) == (model_args.reward_function is None):
        given = "none" if model_args.reward_adapter is None else "both"
        raise InputError(f"expected one of reward_adapter and reward_function in section model, got {given}")
    if model_args.reward_function is not None:
        reward: RewardFunction = load_reward_function(model_args.reward_function)
    scorers = scorer_adapters(model_args.reward_adapter, model_args.judge_adapter)
    prefix_ids = prefix.token_ids
    room = room_for_text(load_config(source, revision), len(prefix_ids)) - args.max_completion_length
    prompt_ids = encode_prompts(tokenizer, prefix, contexts["prompt"], room)
    contexts = contexts.add_column("prompt_ids", prompt_ids)
    parts = split_by_conversation(contexts, data_args.split_seed, data_args.test_size)
    args.check_run(len(parts["train"]))
    check_metric(args, {"reward", *scorers})

    #########
    # Model #
    #########
    folder = create_run_folder(args.output_dir, args.run_name, args.resume_from_checkpoint, data_args)
    start_log(folder)
    if args.should_save:
        write_recipe(folder / "recipe.yaml", model_args, data_args, args)
    args.output_dir = str(folder)
    push_to_hub, args.push_to_hub = args.push_to_hub, False  # ours pushes by allow-list, at the end
    logger.info("contexts that train %d, select %d, are reported %d", *(len(p) for p in parts.values()))
    set_seed(args.seed)
    base = load_base_model(source, revision, model_args.dtype, model_args.attn_implementation).to(args.device)
    model = prefix_from_hard_prompt(base, prefix_ids, revision)
    add_hard_prompt(model, prefix_ids)
    if model_args.prefix_adapter is not None:
        load_weights(model, adapter_folder(model_args.prefix_adapter))
    if "reward" in scorers:
        reward = RewardModel.from_pretrained(scorers["reward"], args.device)
    judge = RewardModel.from_pretrained(scorers["judge"], args.device) if "judge" in scorers else None

    ############
    # Training #
    ############
    trainer = SingleStepPPOTrainer(
        model=PolicyWithValueHead(model, args.temperature),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        processing_class=tokenizer,
        prefix=prefix,
        reward=reward,
        judge=judge,
        callbacks=[ReadableLog()],
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args, folder))
    if trainer.state.best_metric is None:  # nothing was evaluated: the last adapter is kept
        trainer.save_model()
    trainer.save_state()

    ##########
    # Report #
    ##########
    if not trainer.is_world_process_zero():
        return
    load_weights(model, folder)
    table = answer_both(model, tokenizer, parts["test"], trainer.sampling, args.per_device_eval_batch_size, args.seed)
    for name, scorer in trainer.judges.items():
        add_scores(table, name, scorer)
    measured = report(table, list(trainer.judges))
    picture(table, list(trainer.judges), folder / DIFFERENCES_PICTURE)
    (folder / WHAT_CHANGED).write_text(what_changed(table, model, list(trainer.judges)), encoding="utf-8")
    logger.info("soft against hard on contexts that nothing was chosen by:\n%s", measured)
    logger.info("(the reward is the one that was trained on: it shows movement, not what people like)")
    if judge is None:
        logger.info("(no judge_adapter: nothing independent has judged this)")
    for name, scorer in trainer.judges.items():
        if isinstance(scorer, RewardModel) and any(scorer.cuts.values()):
            logger.info("the %s cut %d contexts, %d responses", name, scorer.cuts["context"], scorer.cuts["response"])
    logger.info("side by side, and how far each layer moved: %s", folder / WHAT_CHANGED)
    body = f"A soft prefix that began as this hard prompt:\n\n> {prefix.hard_prompt}\n\n{measured}"
    write_card(folder, "A soft prefix trained by single-step PPO", source, body)
    logger.info("best adapter saved to %s", folder)
    if push_to_hub:
        logger.info(
            "pushed to %s",
            push_adapter(folder, args.hub_model_id, args.hub_private_repo, args.hub_token, args.hub_revision),
        )


if __name__ == "__main__":
    main()
