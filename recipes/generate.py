"""Reply to a conversation with a trained prefix, or chat in the terminal.

python recipes/generate.py --policy_adapter outputs/policy --conversation "I went hiking today."
python recipes/generate.py --policy_adapter outputs/policy
"""

import os

from h2s import InputError
from h2s.data.messages import parse_messages
from h2s.run.arguments import AdapterArguments, ConversationArguments, GenerateArguments
from h2s.run.folder import run_recipe
from h2s.run.recipe import parse_recipe
from h2s.run.terminal import printable


def chat(policy, sampling: dict) -> None:
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
            reply = policy.reply(conversation, **sampling)
        except InputError as error:
            print(f"(not answered: {error})")
            conversation.pop()
            continue
        print(f"assistant: {printable(reply)}", flush=True)
        conversation.append({"role": "assistant", "content": reply or "…"})


@run_recipe
def main(run, argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_recipe(AdapterArguments, ConversationArguments, GenerateArguments, argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise InputError(f"generate.py is one conversation on one process, got {processes}: start it with python")
    conversation = None if data_args.conversation is None else parse_messages(data_args.conversation)
    # Here, not above: it takes seconds to import, and what is wrong with the settings has been told by now.
    from h2s import PrefixTuningPolicyModel

    opened = PrefixTuningPolicyModel.open(model_args.require("policy_adapter", "model"))
    if conversation is not None:  # what cannot be answered is told before a model loads
        opened.encode([conversation], args.max_completion_length)
    policy = PrefixTuningPolicyModel.load(opened)
    names = ("max_completion_length", "temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(args, name) for name in names}
    if conversation is None:
        chat(policy, sampling)
    else:
        print(printable(policy.reply(conversation, **sampling)))


if __name__ == "__main__":
    main()
