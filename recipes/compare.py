"""Soft and hard side by side on held-out contexts: scores with intervals, and a blinded sheet for people to judge.

python recipes/compare.py --config recipes/embedded/compare.yaml --policy_adapter outputs/policy
python recipes/compare.py --judged outputs/compare/blinded.xlsx
"""

from pathlib import Path

from peft import TaskType

from h2s import PrefixTuningPolicyModel
from h2s.data.datasets import load_contexts
from h2s.data.splits import split_by_conversation
from h2s.hub import adapter_folder
from h2s.models import load_config, load_tokenizer, room_for_text
from h2s.prefix.adapter import add_hard_prompt, read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, encode_prompts
from h2s.prefix.generation import Sampling
from h2s.report.blinded_sheet import KEY, SHEET, check_fits_cells, people_verdict, write_blinded_sheet
from h2s.report.soft_vs_hard import (
    DIFFERENCES_PICTURE,
    add_scores,
    answer_both,
    best_of_n_report,
    draw_hard,
    picture,
    report,
)
from h2s.reward.functions import score_replies
from h2s.reward.model import RewardModel, scorer_adapters
from h2s.run.arguments import (
    CompareArguments,
    CompareDatasetArguments,
    CompareModelArguments,
    DatasetArguments,
    require_setting,
)
from h2s.run.folder import create_run_folder, logger, reports_errors, start_log
from h2s.run.recipe import parse_recipe, read_saved_section, write_recipe


def which_contexts(chosen: CompareDatasetArguments, adapter: str) -> str:
    """What is compared, and whether the prefix may have learnt from it."""
    if chosen.split == "all":
        return "The contexts are all of the file: some may have trained the prefix."
    text = f"The contexts are the test part by test_size {chosen.test_size} and split_seed {chosen.split_seed}."
    trained = read_saved_section(Path(adapter) / "recipe.yaml", "dataset")
    size = trained.get("test_size", DatasetArguments.test_size)
    seed = trained.get("split_seed", DatasetArguments.split_seed)
    if "path" in trained and (size, seed) != (chosen.test_size, chosen.split_seed):
        text += f" The prefix was trained by test_size {size} and split_seed {seed}: some may have trained it."
    return text


@reports_errors
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(CompareModelArguments, CompareDatasetArguments, CompareArguments, argv)
    if data_args.judged is not None:
        print(people_verdict(data_args.judged))
        return

    ########
    # Data #
    ########
    contexts = load_contexts(require_setting(data_args.path, "path", "dataset"))
    adapter = adapter_folder(require_setting(model_args.policy_adapter, "policy_adapter", "model"))
    config = read_adapter_config(adapter, TaskType.CAUSAL_LM)
    prefix, tokenizer = ChatPrefix.load(adapter), load_tokenizer(adapter)
    room = room_for_text(load_config(config.base_model_name_or_path, config.revision), config.num_virtual_tokens)
    check_fits_cells(contexts["prompt"])
    prompt_ids = encode_prompts(tokenizer, prefix, contexts["prompt"], room - args.max_completion_length)
    contexts = contexts.add_column("prompt_ids", prompt_ids)
    if data_args.split == "test":
        contexts = split_by_conversation(contexts, data_args.split_seed, data_args.test_size)["test"]
    which = which_contexts(data_args, adapter)
    scorers = scorer_adapters(model_args.reward_adapter, model_args.judge_adapter)

    ###########
    # Compare #
    ###########
    folder = create_run_folder(args.output_dir, args.run_name)
    start_log(folder)
    write_recipe(folder / "recipe.yaml", model_args, data_args, args)
    policy = PrefixTuningPolicyModel.from_pretrained(adapter)
    add_hard_prompt(policy.model, prefix.token_ids)
    sampling = Sampling(args.max_completion_length, args.temperature, args.top_k, args.top_p)
    table = answer_both(policy.model, tokenizer, contexts, sampling, args.batch_size, args.seed)
    rewards = {name: RewardModel.from_pretrained(a, policy.model.device) for name, a in scorers.items()}
    names = list(rewards)
    for name, reward in rewards.items():
        add_scores(table, name, reward)

    ##########
    # Report #
    ##########
    text = f"{report(table, names)}\n{which}"
    if rewards and args.best_of_n and args.temperature:  # without chance all draws are one
        draws = draw_hard(policy.model, tokenizer, contexts, sampling, args.best_of_n, args.batch_size, args.seed)
        for name, reward in rewards.items():
            draws[name] = score_replies(reward, draws["prompt"].tolist(), draws["reply"].tolist())
        text += f"\n\n{best_of_n_report(table, draws, names)}"
    logger.info("soft against hard, temperature %g:\n%s", args.temperature, text)
    if rewards:
        picture(table, names, folder / DIFFERENCES_PICTURE)
        text += f"\n\n![]({DIFFERENCES_PICTURE})"
    (folder / "README.md").write_text(f"# Soft against hard\n\n{text}\n", encoding="utf-8")
    table.to_parquet(folder / "replies.parquet")
    write_blinded_sheet(table, folder, args.seed)
    logger.info("to be judged: %s (fill in human_eval); which side is which: %s", folder / SHEET, KEY)
    logger.info("people's verdict, once it is filled in: compare.py --judged %s", folder / SHEET)
    if data_args.split == "test":
        logger.info("to learn from it, take another split_seed in every recipe: this one holds its contexts out")


if __name__ == "__main__":
    main()
