"""Reply to a conversation with a trained prefix, or chat in the terminal.

python recipes/generate.py --policy_adapter outputs/policy --conversation "I went hiking today."
python recipes/generate.py --policy_adapter outputs/policy
"""

from peft import TaskType

from h2s import PrefixTuningPolicyModel
from h2s.data.messages import parse_messages
from h2s.errors import InputError
from h2s.hub import adapter_folder
from h2s.models import load_config, load_tokenizer, room_for_text
from h2s.prefix.adapter import read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, encode_prompts
from h2s.prefix.generation import Sampling
from h2s.run.arguments import AdapterArguments, ConversationArguments, GenerateArguments, require_setting
from h2s.run.folder import reports_errors
from h2s.run.recipe import parse_recipe


def chat(policy: PrefixTuningPolicyModel, sampling: Sampling) -> None:
    """Turn by turn until an empty line or the end of the input; a turn that cannot be answered is told and dropped."""
    print("An empty line ends the chat.")
    conversation = []
    if policy.prefix.first_role == "assistant":
        conversation = [{"role": "assistant", "content": input("the assistant's first message: ")}]
    while True:
        try:
            text = input("you: ").strip()
        except EOFError:
            return
        if not text:
            return
        conversation.append({"role": "user", "content": text})
        try:
            reply = policy.reply(conversation, sampling)
        except InputError as error:
            print(f"(not answered: {error})")
            conversation.pop()
            continue
        print(f"assistant: {reply}", flush=True)
        conversation.append({"role": "assistant", "content": reply or "…"})


@reports_errors
def main(argv: list[str] | None = None) -> None:
    import torch

    model_args, data_args, args = parse_recipe(AdapterArguments, ConversationArguments, GenerateArguments, argv)
    conversation = None if data_args.conversation is None else parse_messages(data_args.conversation)
    sampling = Sampling(args.max_completion_length, args.temperature, args.top_k, args.top_p)
    adapter = adapter_folder(require_setting(model_args.policy_adapter, "policy_adapter", "model"))
    config = read_adapter_config(adapter, TaskType.CAUSAL_LM)
    if conversation is not None:  # what cannot be answered is told before a model loads
        room = room_for_text(load_config(config.base_model_name_or_path, config.revision), config.num_virtual_tokens)
        prefix, tokenizer = ChatPrefix.load(adapter), load_tokenizer(adapter)
        encode_prompts(tokenizer, prefix, [conversation], room - args.max_completion_length)
    policy = PrefixTuningPolicyModel.from_pretrained(adapter)
    torch.manual_seed(args.seed)
    if conversation is None:
        chat(policy, sampling)
    else:
        print(policy.reply(conversation, sampling))


if __name__ == "__main__":
    main()
