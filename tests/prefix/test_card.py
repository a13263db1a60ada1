from dataclasses import replace

from h2s.prefix.card import describe


def test_what_it_is_and_how_to_use_it(policy):
    """The whole prompt is quoted, an empty line too; the conversation begins as the adapter's do."""
    prefix = replace(policy.prefix, hard_prompt="Be kind.\n\nAsk.", token_ids=[1, 2, 3], question_prefix="Q: ")
    about, use = describe(prefix, "'here'")
    assert about == (
        "A soft prefix of 3 virtual tokens. It began as this hard prompt:\n\n> Be kind.\n> \n> Ask.\n\n"
        "Its chat template puts 'Q: ' in front of the question that the assistant begins with."
    )
    assert use.count("from_pretrained('here')") == 2 and 'chat([{"role": "user"' in use
