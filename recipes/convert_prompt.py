"""Turn a hard prompt into a soft prefix equal to it; seconds, no training.

python recipes/convert_prompt.py --config recipes/embedded/convert.yaml
"""

import logging
import time

from h2s import InputError, PrefixTuningPolicyModel
from h2s.models import resolve_dtype
from h2s.prefix.opened import open_policy
from h2s.run.arguments import ConvertArguments, HardPromptArguments, NoArguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe

logger = logging.getLogger("h2s")

# The largest difference of a logit, relative to the largest logit, that float32 rounding explains.
TOLERANCE = 1e-4


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(HardPromptArguments, NoArguments, ConvertArguments, argv)
    started = time.time()

    #########
    # Model #
    #########
    opened = open_policy(model_args)
    folder = run.start(model_args, data_args, args)

    ###########
    # Convert #
    ###########
    # State equality is shown in float32, whatever the model will run in; bf16's own noise is reported beside it.
    policy = PrefixTuningPolicyModel.load(opened, "float32", model_args.attn_implementation)
    difference = policy.difference_to_hard_prompt()
    logger.info("%d virtual tokens", len(policy.prefix.token_ids))
    logger.info("soft minus hard in float32: %.2g of the largest logit (limit %g)", difference, TOLERANCE)
    if difference > TOLERANCE:
        raise InputError(
            f"the prefix does not equal the hard prompt ({difference:.2g} > {TOLERANCE}): is it a Gemma 3?"
        )
    measured = f"Largest logit difference to the hard prompt, relative to the largest logit: float32 {difference:.2g}"
    if str(resolve_dtype(model_args.dtype)) == "torch.bfloat16":
        low = PrefixTuningPolicyModel.load(opened, "bfloat16", model_args.attn_implementation)
        low_difference = low.difference_to_hard_prompt()
        logger.info("the same in bfloat16: %.2g (rounding noise)", low_difference)
        measured += f", bfloat16 {low_difference:.2g}"

    ########
    # Save #
    ########
    if not run.is_main_process:
        return
    policy.save_pretrained(folder, f"{measured}.")
    logger.info("saved to %s in %.0f s", folder, time.time() - started)
    if args.push_to_hub:
        url = policy.push_to_hub(
            args.hub_model_id or folder.name,
            f"{measured}.",
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision,
        )
        logger.info("pushed to %s", url)


if __name__ == "__main__":
    main()
