"""Turn a hard prompt into a soft prefix equal to it; seconds, no training.

python recipes/convert_prompt.py --config recipes/embedded/convert.yaml
"""

import time

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from h2s.errors import InputError
from h2s.hub import push_adapter, write_card
from h2s.models import load_base_model, load_config, load_tokenizer, model_source, resolve_dtype, room_for_text
from h2s.prefix.adapter import prefix_from_hard_prompt, save_adapter
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, encode_prompts, wrap_chat_template
from h2s.run.arguments import ConvertArguments, HardPromptArguments, NoArguments, read_hard_prompt, require_setting
from h2s.run.folder import create_run_folder, logger, reports_errors, start_log
from h2s.run.recipe import parse_recipe, write_recipe

# The largest difference of a logit, relative to the largest logit, that float32 rounding explains.
TOLERANCE = 1e-4
EXAMPLES = {
    "user": [[{"role": "user", "content": "Hello! I went for a long walk today."}]],
    "assistant": [[{"role": "assistant", "content": "How was your day?"}, {"role": "user", "content": "Quiet."}]],
}


@torch.no_grad()
def hard_logits(base: PreTrainedModel, prefix_ids: list[int], prompt: list[int]) -> torch.Tensor:
    """Logits (T, V) of the prompt's positions with the hard prompt as text in front."""
    ids = torch.tensor([prefix_ids + prompt], device=base.device)
    return base(ids, logits_to_keep=len(prompt)).logits[0].float()


def measured_difference(base, model, tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix, prefix_ids) -> float:
    """The largest logit difference between soft and hard, relative to the largest logit, on an example."""
    (prompt,) = encode_prompts(tokenizer, prefix, EXAMPLES[prefix.first_role])
    hard = hard_logits(base, prefix_ids, prompt)
    with torch.no_grad():
        soft = model(torch.tensor([prompt], device=base.device)).logits[0].float()
    return ((soft - hard).abs().max() / hard.abs().max()).item()


@reports_errors
def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(HardPromptArguments, NoArguments, ConvertArguments, argv)
    started = time.time()

    #########
    # Model #
    #########
    prompt = read_hard_prompt(model_args)
    source = model_source(require_setting(model_args.model_name_or_path, "model_name_or_path", "model"))
    tokenizer = load_tokenizer(source, model_args.model_revision)
    prefix = chat_prefix(tokenizer, prompt, model_args.opening_user_message)
    prefix_ids = prefix.token_ids
    room = room_for_text(load_config(source, model_args.model_revision), len(prefix_ids))
    if room < 1:
        raise InputError(f"the hard prompt is {len(prefix_ids)} tokens long and leaves the model no room for a reply")
    folder = create_run_folder(args.output_dir, args.run_name)
    start_log(folder)
    write_recipe(folder / "recipe.yaml", model_args, data_args, args)

    ###########
    # Convert #
    ###########
    wrap_chat_template(tokenizer, prefix)
    # State equality is shown in float32, whatever the model will run in; bf16's own noise is reported beside it.
    device = PartialState().device
    base = load_base_model(source, model_args.model_revision, "float32", model_args.attn_implementation).to(device)
    model = prefix_from_hard_prompt(base, prefix_ids, model_args.model_revision)
    difference = measured_difference(base, model, tokenizer, prefix, prefix_ids)
    logger.info("%d virtual tokens", len(prefix_ids))
    logger.info("soft minus hard in float32: %.2g of the largest logit (limit %g)", difference, TOLERANCE)
    if difference > TOLERANCE:
        raise InputError(
            f"the prefix does not equal the hard prompt ({difference:.2g} > {TOLERANCE}): is it a Gemma 3?"
        )
    measured = f"Largest logit difference to the hard prompt, relative to the largest logit: float32 {difference:.2g}"
    save_adapter(model, tokenizer, prefix, folder)
    if resolve_dtype(model_args.dtype) == torch.bfloat16:
        low = load_base_model(source, model_args.model_revision, "bfloat16", model_args.attn_implementation).to(device)
        soft = prefix_from_hard_prompt(low, prefix_ids)
        low_difference = measured_difference(low, soft, tokenizer, prefix, prefix_ids)
        logger.info("the same in bfloat16: %.2g (rounding noise)", low_difference)
        measured += f", bfloat16 {low_difference:.2g}"

    ########
    # Save #
    ########
    body = f"A soft prefix of {len(prefix_ids)} virtual tokens, equal to this hard prompt:\n\n> {prompt}\n\n{measured}."
    write_card(folder, "A hard prompt as a soft prefix", source, body)
    logger.info("saved to %s in %.0f s", folder, time.time() - started)
    if args.push_to_hub:
        logger.info("pushed to %s", push_adapter(folder, args.hub_model_id, args.hub_private_repo, args.hub_token))


if __name__ == "__main__":
    main()
