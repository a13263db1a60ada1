"""Turn a hard prompt into a soft prefix equal to it, or a checkpoint of hardPrompt2softPrompt; seconds, no training.

python recipes/convert_prompt.py --config recipes/embedded/convert.yaml
python recipes/convert_prompt.py --model_name_or_path google/gemma-3-1b-it --legacy_checkpoint old.pth
"""

import logging
import time

from h2s import InputError
from h2s.run.arguments import ConvertArguments, ConvertModelArguments, QuestionArguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")

# The largest difference of a logit, relative to the largest logit, that float32 rounding explains.
TOLERANCE = 1e-4


def difference_to_original(policy, opened) -> float:
    """Of the largest logit: what a conversion may differ by is rounding."""
    if opened.legacy is None:
        return policy.difference_to_hard_prompt()
    return policy.difference_to_legacy(opened.legacy)


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(ConvertModelArguments, QuestionArguments, ConvertArguments, argv)
    # Here, not above: they take seconds to import, and what is wrong with the settings has been told by now.
    from h2s import PrefixTuningPolicyModel
    from h2s.models import resolve_dtype
    from h2s.prefix.families import SHOWN
    from h2s.prefix.opened import open_policy

    started = time.time()

    #########
    # Model #
    #########
    legacy_file = model_args.legacy_checkpoint
    opened = open_policy(model_args, legacy_checkpoint=legacy_file, question_prefix=data_args.question_prefix)
    run.check_push(args, opened.source)
    folder = run.start(model_args, data_args, args)

    ###########
    # Convert #
    ###########
    # State equality is shown in float32, whatever the model will run in; bf16's own noise is reported beside it.
    policy = PrefixTuningPolicyModel.load(opened, "float32", model_args.attn_implementation)
    original = "the hard prompt" if opened.legacy is None else "the prototype's own forward"
    difference = difference_to_original(policy, opened)
    logger.info("%d virtual tokens", len(policy.prefix.token_ids))
    logger.info("prefix minus %s in float32: %.2g of the largest logit (limit %g)", original, difference, TOLERANCE)
    if difference > TOLERANCE:
        raise InputError(
            f"the prefix does not equal {original} ({difference:.2g} > {TOLERANCE}): {opened.config.model_type} models "
            f"cannot be used as they are; expected another chat model, {', '.join(SHOWN)} say"
        )
    measured = f"Largest logit difference to {original}, relative to the largest logit: float32 {difference:.2g}"
    if str(resolve_dtype(model_args.dtype)) == "torch.bfloat16":
        low = PrefixTuningPolicyModel.load(opened, "bfloat16", model_args.attn_implementation)
        low_difference = difference_to_original(low, opened)
        logger.info("the same in bfloat16: %.2g (rounding noise)", low_difference)
        measured += f", bfloat16 {low_difference:.2g}"
    if opened.legacy is not None:
        to_hard_prompt = policy.difference_to_hard_prompt()
        logger.info("soft minus its hard prompt in float32: %.2g of the largest logit", to_hard_prompt)
        logger.info("its value head is not taken: the one here is another network, which train_policy.py trains first")
        measured += f"; to its hard prompt: float32 {to_hard_prompt:.2g}"

    ########
    # Save #
    ########
    if not run.is_main_process:
        return
    policy.save_pretrained(folder, f"{measured}.")
    logger.info("saved to %s in %.0f s", folder, time.time() - started)
    run.push(args)


if __name__ == "__main__":
    main()
