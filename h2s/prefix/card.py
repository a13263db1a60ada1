"""What the card of a policy says of its prefix, and how to use it with plain PEFT."""

from h2s.prefix.chat_template import ChatPrefix

USE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained({source})
tokenizer = AutoTokenizer.from_pretrained({source})
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat({messages})"""
# PEFT counts no virtual tokens in a cache that it is handed: it would crash, or drop as many of the conversation's.
CACHE = """

Give `generate` the whole conversation at each turn, without the last turn's cache. To keep a cache over turns, begin it
as `past_key_values=model.get_prompt(1)` and call `model.get_base_model().generate` with {length} ids of any token in
front of the conversation's, which stand for the prefix."""
EXAMPLES = {
    "user": '[{"role": "user", "content": "Hello! I went for a long walk today."}]',
    "assistant": '[{"role": "assistant", "content": "How was your day?"}, {"role": "user", "content": "Quiet."}]',
}


def describe(prefix: ChatPrefix, source: str) -> tuple[str, str]:
    """What the adapter is, as Markdown, and Python that loads it from `source` (an expression) and chats."""
    prompt = prefix.hard_prompt.replace("\n", "\n> ")
    about = f"A soft prefix of {len(prefix.token_ids)} virtual tokens. It began as this hard prompt:\n\n> {prompt}"
    if words := prefix.question_prefix:
        about += f"\n\nIts chat template puts {words!r} in front of the question that the assistant begins with."
    return about + CACHE.format(length=len(prefix.token_ids)), USE.format(
        source=source, messages=EXAMPLES[prefix.first_role]
    )
