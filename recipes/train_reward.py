"""Stage 1: learn the judgements of a sheet as a BERT + prefix reward model.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_reward.py \
        --config recipes/embedded/reward.yaml
"""

import shutil
import time

import pandas as pd

from h2s.data.datasets import load_preferences
from h2s.data.splits import folds_by_conversation, share_with_judge, split_by_conversation
from h2s.hub import push_adapter, write_card
from h2s.models import load_config, load_tokenizer, model_source
from h2s.report.accuracy import (
    PAIRS,
    accuracy_line,
    accuracy_report,
    pair_table,
    sheet_report,
    write_report,
)
from h2s.reward.config import RewardModelConfig
from h2s.reward.model import RewardModel, check_encoder, max_text_tokens
from h2s.reward.trainer import train_reward_model
from h2s.run.arguments import RewardDatasetArguments, RewardModelArguments, require_setting
from h2s.run.folder import create_run_folder, logger, reports_errors, start_log
from h2s.run.recipe import parse_recipe, write_recipe


@reports_errors
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(RewardModelArguments, RewardDatasetArguments, RewardModelConfig, argv)

    ########
    # Data #
    ########
    preferences = load_preferences(require_setting(data_args.path, "path", "dataset"))
    parts = split_by_conversation(preferences.dataset, data_args.split_seed, data_args.test_size)
    trained = {"reward": parts}
    if data_args.judge_share is not None:
        trained = dict(
            zip(("reward", "judge"), share_with_judge(parts, data_args.split_seed, data_args.judge_share), strict=True)
        )
    folds = []
    if data_args.folds is not None:
        folds = folds_by_conversation(preferences.dataset, data_args.folds, data_args.split_seed)

    #########
    # Model #
    #########
    name = require_setting(model_args.reward_model_name_or_path, "reward_model_name_or_path", "model")
    source = model_source(name)
    tokenizer, config = load_tokenizer(source), load_config(source)
    check_encoder(config, tokenizer, name)
    max_tokens = max_text_tokens(config, model_args.num_virtual_tokens, model_args.max_tokens)
    folder = create_run_folder(args.output_dir, args.run_name, args.resume_from_checkpoint, data_args)
    start_log(folder)
    if args.should_save:
        write_recipe(folder / "recipe.yaml", model_args, data_args, args)
    push_to_hub, args.push_to_hub = args.push_to_hub, False  # ours pushes by allow-list, at the end
    logger.info("%s\n%s", preferences.summary(), sheet_report(preferences))

    def train(split, where) -> RewardModel:
        return train_reward_model(source, model_args.num_virtual_tokens, tokenizer, max_tokens, split, args, where)

    ####################
    # Cross-validation #
    ####################
    tables: list[pd.DataFrame] = []
    started = time.time()
    for number, split in enumerate(folds, start=1):
        where = folder / "folds" / str(number)
        if not (where / PAIRS).is_file():  # a resumed run has it already
            table = pair_table(train(split, where), split["test"])
            if args.should_save:
                shutil.rmtree(where, ignore_errors=True)  # its checkpoints
                where.mkdir(parents=True)
                table.to_parquet(where / PAIRS)
            args.distributed_state.wait_for_everyone()
        tables.append(pd.read_parquet(where / PAIRS))
        left = (time.time() - started) / number * (len(folds) - number) / 60
        logger.info(
            "fold %d of %d: accuracy %s; %.0f minutes left", number, len(folds), accuracy_line(tables[-1]), left
        )

    ############
    # Training #
    ############
    for role, split in trained.items():
        where = folder if role == "reward" else folder / role
        logger.info("%s: pairs that train %d, select %d, are reported %d", role, *(len(p) for p in split.values()))
        reward = train(split, where)

        ##########
        # Report #
        ##########
        if not args.should_save:
            continue
        reward.save(where)
        table = pair_table(reward, split["test"])
        text = accuracy_report(table, "on conversations that this model never saw")
        if tables and role == "reward":
            what = f"on all conversations, each by a model that never saw it ({len(tables)} folds)"
            text = f"{write_report(pd.concat(tables, ignore_index=True), what, preferences, where)}\n\n{text}"
        else:
            write_report(table, "on conversations that it never saw", preferences, where)
        logger.info("%s:\n%s", role, text)
        body = "Scores a response to a context; trained on human A/B judgements with the pairwise logistic loss."
        write_card(where, f"A BERT + prefix {role} model", source, f"{body}\n\n{text}", reward=True)
        logger.info("saved to %s", where)
    if push_to_hub and args.should_save:
        logger.info(
            "pushed to %s",
            push_adapter(folder, args.hub_model_id, args.hub_private_repo, args.hub_token, args.hub_revision),
        )


if __name__ == "__main__":
    main()
