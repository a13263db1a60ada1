"""What the card of a policy says of its prefix, and how to use it with plain PEFT."""

from transformers import GenerationConfig

from h2s.prefix.chat_template import ChatPrefix

USE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, {name}pipeline

{line}model = AutoPeftModelForCausalLM.from_pretrained({source}{argument})
{unset}tokenizer = AutoTokenizer.from_pretrained({source})
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat({messages})"""
# PEFT counts no virtual tokens in a cache that it is handed: it would crash, or drop as many of the conversation's.
CACHE = """

Give `generate` the whole conversation at each turn, without the last turn's cache. To keep a cache over turns, begin it
as `past_key_values=model.get_prompt(1)` and call `model.get_base_model().generate` with {length} ids of any token in
front of the conversation's, which stand for the prefix."""
# What a base's generation_config.json may set and PEFT cannot generate with from a prefix, and what is set instead.
INSTEAD = {
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
}
EXAMPLES = {
    "user": '[{"role": "user", "content": "Hello! I went for a long walk today."}]',
    "assistant": '[{"role": "assistant", "content": "How was your day?"}, {"role": "user", "content": "Quiet."}]',
}


def describe(prefix: ChatPrefix, source: str, generation: GenerationConfig) -> tuple[str, str]:
    """What the adapter is, as Markdown, and Python that loads it from `source` (an expression) and chats.

    `generation` is the base's own, whose settings plain PEFT takes over.
    """
    prompt = prefix.hard_prompt.replace("\n", "\n> ")
    about = f"A soft prefix of {len(prefix.token_ids)} virtual tokens. It began as this hard prompt:\n\n> {prompt}"
    if words := prefix.question_prefix:
        about += f"\n\nIts chat template puts {words!r} in front of the question that the assistant begins with."
    quantized = dict.fromkeys(("name", "line", "argument"), "")
    if prefix.quantization is not None:
        about += "\n\nIt was made on its base in 4 bits, and is used on it so."
        settings = ", ".join(f"{name}={value!r}" for name, value in prefix.quantization.items())
        quantized = {
            "name": "BitsAndBytesConfig, ",
            "line": f"in_4_bits = BitsAndBytesConfig({settings})\n",
            "argument": ", quantization_config=in_4_bits",
        }
    unset = {name: value for name, value in INSTEAD.items() if getattr(generation, name, None) not in (value, None)}
    if unset:
        about += f"\n\nIts base generates with {' and '.join(unset)} set, which PEFT cannot: the example changes that."
    changes = "".join(f"model.generation_config.{name} = {value}\n" for name, value in unset.items())
    about += CACHE.format(length=len(prefix.token_ids))
    return about, USE.format(source=source, messages=EXAMPLES[prefix.first_role], unset=changes, **quantized)
