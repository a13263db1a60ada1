"""A trained policy for use: replies to a conversation, and the prototype's call."""

from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, TaskType
from transformers import PreTrainedTokenizerBase

from h2s.data.messages import Messages, parse_messages
from h2s.errors import InputError
from h2s.hub import adapter_folder
from h2s.models import load_tokenizer, resolve_dtype, room_for_text
from h2s.prefix.adapter import read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, encode_prompts
from h2s.prefix.generation import Sampling, decode, generate, stop_token_ids

# The prototype put these words in front of every question ("all right, the question is:").
QUESTION_PREFIX = "好的，題目如下："


class PrefixTuningPolicyModel:
    """A chat model with its soft prefix."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix):
        self.model = model
        self.tokenizer = tokenizer
        self.prefix = prefix

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, dtype: str = "auto", device: str | None = None):
        """Load a policy adapter and the model it was made for.

        Args:
            folder_or_hub_id: an adapter made by `convert_prompt.py` or `train_policy.py`.
            dtype: of the frozen model; `auto` is bfloat16 on CUDA and float32 elsewhere.
            device: CUDA where there is one by default.

        Raises:
            InputError: it is not a policy adapter.
        """
        folder = adapter_folder(folder_or_hub_id)
        read_adapter_config(folder, TaskType.CAUSAL_LM)
        prefix = ChatPrefix.load(folder)
        tokenizer = load_tokenizer(folder)
        model = AutoPeftModelForCausalLM.from_pretrained(
            folder, dtype=resolve_dtype(dtype), use_safetensors=True, trust_remote_code=False
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), tokenizer, prefix)

    def reply(self, conversation: Messages, sampling: Sampling) -> str:
        """The assistant's reply to a conversation that waits for one.

        Raises:
            InputError: the conversation begins with the wrong role, or is too long.
        """
        config = self.model.get_base_model().config
        room = room_for_text(config, self.model.active_peft_config.num_virtual_tokens) - sampling.max_completion_length
        prompts = encode_prompts(self.tokenizer, self.prefix, [conversation], room)
        stops = stop_token_ids(self.model, self.tokenizer)
        completions = generate(self.model, prompts, sampling, stops, self.tokenizer.pad_token_id)
        return decode(self.tokenizer, completions[0], stops)

    def generate_response(
        self,
        asked_question: str,
        conversation_history: list[dict[str, Any]],
        temperature: float = 0.7,
        max_completion_length: int = 128,
        question_prefix: str = QUESTION_PREFIX,
    ) -> list[dict[str, Any]]:
        """Reply as the prototype did: the question stands as the conversation's first message, the assistant's.

        Args:
            asked_question: the question.
            conversation_history: the messages after it, contents as text or `[{"type": "text", "text": …}]`.
            temperature: 0 is greedy.
            max_completion_length: most tokens of the reply.
            question_prefix: words in front of the question.

        Returns:
            The history with the reply appended, in the form `[{"type": "text", "text": …}]`, without the question.

        Raises:
            InputError: the adapter was made without an `opening_user_message`, so no conversation with it can begin
                with the assistant.
        """
        if self.prefix.first_role != "assistant":
            raise InputError(
                "generate_response begins the conversation with the assistant's question, which this adapter cannot: "
                "convert the prompt with an opening_user_message"
            )
        question = {"role": "assistant", "content": question_prefix + asked_question}
        conversation = parse_messages([question, *conversation_history])
        text = self.reply(conversation, Sampling(max_completion_length, temperature))
        return [*conversation_history, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
