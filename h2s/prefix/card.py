"""What the card of a policy says of its prefix, and how to use it with plain PEFT."""

from h2s.prefix.chat_template import ChatPrefix

USE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained({source})
tokenizer = AutoTokenizer.from_pretrained({source})
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
chat({messages})"""
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
    return about, USE.format(source=source, messages=EXAMPLES[prefix.first_role])
