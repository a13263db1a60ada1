"""The policy as the Python API gives it, beside the same model under the hard prompt as text."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import HARD_PROMPT, WINDOW, sample_context, turns
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from h2s import InputError, PrefixTuningPolicyModel
from h2s.prefix.adapter import HARD, SOFT, fingerprint, hard_prefix, soft_prefix

NEW_TOKENS = 6
SHORT = ["hi", "I like tea.", [{"role": "user", "content": "hi"}], "[1, 2]", '{"a": 1}']
RAGGED = [*SHORT, *(sample_context(i) for i in range(4)), "I went for a long walk. " * 12]
GREEDY = {"max_completion_length": NEW_TOKENS, "temperature": 0}
# What transformers' `generate` needs for the same.
PLAIN = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": [1, 5], "pad_token_id": 0}


@pytest.fixture(scope="module")
def talkative(gemma_folder, tmp_path_factory):
    """The tiny Gemma repeats itself; with an output layer of its own it says letters, and now and then ends a turn."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    model = AutoModelForCausalLM.from_pretrained(gemma_folder, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(gemma_folder)
    spoken = [
        tokenizer.decode([i]).strip().isalpha() and tokenizer.decode([i]).isascii() for i in range(len(tokenizer))
    ]
    spoken[5] = True
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape) * torch.tensor(spoken)[:, None])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(talkative):
    """The base model and its tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(talkative)


def whole_ids(stock, messages):
    return stock[1].apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@torch.no_grad()
def answer(stock, messages, new_tokens=NEW_TOKENS):
    """The greedy reply to a whole conversation, argmax by argmax, with neither a cache nor `generate`."""
    ids, new = whole_ids(stock, messages), []
    while len(new) < new_tokens and not set(new) & {1, 5}:
        new.append(int(stock[0](torch.tensor([ids + new])).logits[0, -1].argmax()))
    return stock[1].decode(new, skip_special_tokens=True).strip()


def under(hard_prompt, conversation, *opening):
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    return [{"role": "system", "content": hard_prompt}, *opening, *messages]


def from_hard_prompt(folder, hard_prompt=HARD_PROMPT, *opening, **settings):
    return PrefixTuningPolicyModel.from_hard_prompt(str(folder), hard_prompt, *opening, dtype="float32", **settings)


@pytest.fixture
def policy(talkative):
    return from_hard_prompt(talkative)


def move(policy):
    """As far as training might, and then some."""
    with torch.no_grad():
        soft_prefix(policy.model).add_(torch.randn(soft_prefix(policy.model).shape))


# From a hard prompt


def test_a_name_and_a_loaded_model_give_the_same_prefix(talkative):
    named = from_hard_prompt(talkative, HARD_PROMPT, "start")
    model = AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32).train()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.9  # would be seen, if it were still training
    loaded = PrefixTuningPolicyModel.from_hard_prompt(model, HARD_PROMPT, "start")
    assert loaded.model.get_base_model() is model and not model.training
    assert torch.equal(soft_prefix(named.model), soft_prefix(loaded.model))
    assert named.prefix == loaded.prefix and named.stop_ids == loaded.stop_ids == [1, 5]
    assert named.tokenizer.chat_template == loaded.tokenizer.chat_template
    for policy in (named, loaded):
        assert [n for n, p in policy.model.named_parameters() if p.requires_grad] == [
            f"prompt_encoder.{SOFT}.embedding.weight"
        ]


def test_a_tokenizer_that_is_given_stays_as_it_was(stock):
    """And so may be given again."""
    before = stock[1].chat_template
    for hard_prompt in (HARD_PROMPT, "Be brief."):
        policy = PrefixTuningPolicyModel.from_hard_prompt(stock[0], hard_prompt, tokenizer=stock[1])
        assert policy.reply("hi", **GREEDY) == answer(stock, under(hard_prompt, "hi"))
    assert stock[1].chat_template == before


def test_a_loaded_model_of_a_relative_folder_is_saved_as_absolute(talkative, tmp_path, monkeypatch):
    monkeypatch.chdir(talkative.parent)
    model = AutoModelForCausalLM.from_pretrained(talkative.name)
    PrefixTuningPolicyModel.from_hard_prompt(model, HARD_PROMPT).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert PrefixTuningPolicyModel.open("adapter").source == str(talkative)


def test_settings_of_the_chat_template_reach_the_prefix(talkative, tmp_path):
    base = shutil.copytree(talkative, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text("{%- set bos_token = bos_token ~ (style | default('plain')) -%}" + template.read_text())
    policy = from_hard_prompt(base, chat_template_kwargs={"style": "warm"})
    assert policy.prefix.text.startswith("<bos>warm<start_of_turn>")
    policy.save_pretrained(tmp_path / "adapter")
    assert PrefixTuningPolicyModel.open(tmp_path / "adapter").prefix.chat_template_kwargs == {"style": "warm"}


@pytest.mark.parametrize("opening", [(), ("start",)], ids=["user first", "assistant first"])
def test_difference_to_the_hard_prompt(talkative, opening):
    policy = from_hard_prompt(talkative, HARD_PROMPT, *opening)
    assert 0 < policy.difference_to_hard_prompt() < 1e-4
    move(policy)
    assert policy.difference_to_hard_prompt() > 0.1


# Replies


@pytest.mark.parametrize(
    ("hard_prompt", "conversations"), [("a", SHORT), (HARD_PROMPT, RAGGED)], ids=["within the window", "beyond it"]
)
def test_replies_stand_in_order_each_as_alone(talkative, stock, hard_prompt, conversations):
    policy = from_hard_prompt(talkative, hard_prompt)
    wholes = [under(hard_prompt, c) for c in conversations]
    longest = max(len(whole_ids(stock, w)) for w in wholes) + NEW_TOKENS
    assert longest <= WINDOW if conversations is SHORT else longest > 4 * WINDOW
    expected = [answer(stock, w) for w in wholes]
    assert len(set(expected)) == len(conversations) - 1  # "hi" twice, as text and as messages
    assert policy.generate(conversations, **GREEDY) == expected
    assert [policy.reply(c, **GREEDY) for c in conversations] == expected
    assert expected[0] == expected[2]


def test_nothing_asked_nothing_answered(policy):
    assert policy.generate([]) == []


def test_a_seed_gives_the_same_replies_and_no_other_draws(policy):
    conversations = [sample_context(i) for i in range(3)]

    def draw(**settings):
        return policy.generate(conversations, max_completion_length=8, temperature=1.0, **settings)

    torch.manual_seed(3)
    expected = draw()  # from the state outside
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert draw(seed=3) == expected == draw(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(seed=5) != expected != draw()
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("likeliest", [{"top_k": 1}, {"top_p": 1e-6}], ids=repr)
def test_top_k_and_top_p_reach_the_sampling(policy, likeliest):
    conversations = [sample_context(i) for i in range(3)]
    greedy = policy.generate(conversations, **GREEDY)
    drawn = {"max_completion_length": NEW_TOKENS, "temperature": 5.0}
    assert policy.generate(conversations, **drawn, **likeliest) == greedy != policy.generate(conversations, **drawn)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"repetition_penalty": 3.0}, {"suppress_tokens": list(range(60, 200))}], ids=repr
)
def test_generation_settings_act_as_in_plain_peft(policy, settings):
    conversations = [sample_context(i) for i in (1, 2, 4)]
    prompts = policy.encode(conversations, NEW_TOKENS)
    expected = []
    for prompt in prompts:
        output = policy.model.generate(input_ids=torch.tensor([prompt]), **PLAIN, **settings)
        expected.append(policy.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    assert policy.generate(conversations, **GREEDY, **settings) == expected
    assert policy.generate(conversations, **GREEDY, **settings, cache_implementation="static") == expected
    assert policy.generate(conversations, **GREEDY) != expected


def test_a_streamer_gets_the_text_that_is_returned(policy):
    streamer = TextIteratorStreamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = policy.reply("I like tea.", max_completion_length=12, seed=1, streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces).strip() == text and len(pieces) > 3


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("max_new_tokens", "max_completion_length"),
        ("do_sample", r"temperature \(0 is greedy\)"),
        ("generation_config", "max_completion_length, temperature, top_k and top_p"),
        ("num_return_sequences", "a conversation as often as you want replies"),
    ],
)
def test_arguments_of_another_name_here_are_refused(policy, name, instead):
    with pytest.raises(InputError, match=f"{name} has another name here: give {instead}"):
        policy.reply("hi", **{name: 1})


@pytest.mark.parametrize(
    ("opening", "bad", "words"),
    [
        ((), turns("assistant", "user"), "1 of 2 contexts begin with the assistant, .* mend context 2"),
        (("start",), "hi", "1 of 2 contexts begin with the user, .* mend context 2"),
        ((), "tea " * 1100, "context 2 is .* tokens long"),
        ((), "hi <end_of_turn>", "context 2: a message of the user spells out '<end_of_turn>'"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_named(talkative, opening, bad, words):
    policy = from_hard_prompt(talkative, HARD_PROMPT, *opening)
    good = turns("assistant", "user") if opening else "hi"
    with pytest.raises(InputError, match=words):
        policy.generate([good, bad], **GREEDY)


# The hard prompt beside it


def test_hard_prompt_active_answers_as_the_hard_prompt(policy, stock):
    assert list(policy.model.peft_config) == [SOFT]
    move(policy)
    conversations = RAGGED[3:]
    moved = policy.generate(conversations, **GREEDY)
    hard = [answer(stock, under(HARD_PROMPT, c)) for c in conversations]
    with policy.hard_prompt_active():
        assert policy.generate(conversations, **GREEDY) == hard != moved
    assert policy.generate(conversations, **GREEDY) == moved
    frozen = hard_prefix(policy.model)
    assert not frozen.requires_grad and soft_prefix(policy.model).requires_grad
    with pytest.raises(KeyError), policy.hard_prompt_active():
        assert policy.model.active_adapter == HARD
        raise KeyError
    assert policy.model.active_adapter == SOFT
    assert hard_prefix(policy.model) is frozen  # made once


# Saved and loaded


def test_round_trip_of_a_moved_prefix(talkative, tmp_path):
    policy = from_hard_prompt(talkative, HARD_PROMPT, "start")
    move(policy)
    with policy.hard_prompt_active():  # whatever is active, the soft prefix is saved
        policy.save_pretrained(tmp_path / "adapter", "Measured.")
    loaded = PrefixTuningPolicyModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert torch.equal(soft_prefix(loaded.model), soft_prefix(policy.model))
    assert loaded.prefix == policy.prefix and list(loaded.model.peft_config) == [SOFT]
    conversations = [turns("assistant", "user"), [*turns("assistant"), {"role": "user", "content": "[tea]"}]]
    assert loaded.generate(conversations, **GREEDY) == policy.generate(conversations, **GREEDY)

    # It goes on training: the prefix moves, and nothing else can.
    (trained,) = [p for p in loaded.model.parameters() if p.requires_grad]
    assert trained is soft_prefix(loaded.model)
    (prompt,) = loaded.encode(conversations[:1], 1)
    loaded.model(torch.tensor([prompt])).logits.logsumexp(-1).mean().backward()
    torch.optim.Adam([trained], lr=0.1).step()
    assert (trained - soft_prefix(policy.model)).abs().max().item() == pytest.approx(0.1, rel=1e-3)
    loaded.save_pretrained(str(tmp_path / "again"))
    saved = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert list(saved) == ["prompt_embeddings"] and torch.equal(saved["prompt_embeddings"], trained)
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in (tmp_path / "adapter").iterdir()}


def test_only_the_main_process_writes(policy, tmp_path):
    policy.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


def test_the_card_quotes_the_whole_prompt_and_names_no_folder_of_this_machine(talkative, tmp_path):
    hard_prompt = "Be kind.\n\n# Rules\nAsk one question.\n"
    policy = from_hard_prompt(talkative, hard_prompt)
    policy.save_pretrained(tmp_path / "run" / "checkpoint-3", "Measured: **much**.")
    card = (tmp_path / "run" / "checkpoint-3" / "README.md").read_text(encoding="utf-8")
    quoted = card.split("It began as this hard prompt:\n\n")[1].split("\n\nGive `generate`")[0]
    assert "\n\nMeasured: **much**.\n\nBase model" in card
    assert quoted.splitlines() == ["> Be kind.", "> ", "> # Rules", "> Ask one question.", "> "]
    assert f"{len(policy.prefix.token_ids)} virtual tokens" in card
    assert "Base model: talkative\n" in card
    for folder in (talkative.parent, tmp_path):
        assert str(folder) not in card and os.path.relpath(folder) not in card


# The prototype's call


@pytest.mark.parametrize("parts", [False, True])
def test_generate_response(talkative, stock, parts):
    """The question gets the adapter's own words in front, or those of the call."""
    policy = from_hard_prompt(talkative, HARD_PROMPT, "start", question_prefix="題目：")
    texts = ["Good walk.", "and you?", "How long?"]
    roles = ["user", "assistant", "user"]
    history = [
        {"role": r, "content": [{"type": "text", "text": t}] if parts else t} for r, t in zip(roles, texts, strict=True)
    ]
    asked = {"temperature": 0, "max_completion_length": NEW_TOKENS}
    answered = policy.generate_response("How was it?", history, **asked)
    assert len(history) == 3 and answered[:-1] == history

    def expected(question):
        plain = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        front = [{"role": "user", "content": "start"}, {"role": "assistant", "content": question}]
        text = answer(stock, under(HARD_PROMPT, plain, *front))
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    replies = {words: expected(f"{words}How was it?") for words in ("題目：", "", "start ")}
    assert len({r["content"][0]["text"] for r in replies.values()}) == 3
    assert answered[-1] == replies["題目："]
    for words, reply in replies.items():
        assert policy.generate_response("How was it?", history, question_prefix=words, **asked)[-1] == reply
    assert policy.generate_response("How was it?", history, **asked) == answered  # the policy keeps its own
    without = from_hard_prompt(talkative, HARD_PROMPT, "start")
    assert without.generate_response("How was it?", history, **asked)[-1] == replies[""]


def test_generate_response_needs_an_adapter_that_begins_with_the_assistant(policy):
    with pytest.raises(InputError, match="convert the prompt with an opening_user_message"):
        policy.generate_response("How was it?", turns("user"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "PeftModel"}, "must be a name or a transformers model, got a PeftModelForCausalLM"),
        ({"tokenizer": "nonsense"}, "tokenizer is for a model that is loaded already"),
    ],
)
def test_what_no_policy_is_made_of(policy, gemma_folder, given, words):
    given = {"model": gemma_folder, "hard_prompt": HARD_PROMPT} | given
    if given["model"] == "PeftModel":
        given["model"] = policy.model
    with pytest.raises(InputError, match=words):
        PrefixTuningPolicyModel.from_hard_prompt(**given)


@pytest.mark.parametrize(
    ("conversations", "settings", "words"),
    [
        ("walk", {}, "a list of conversations, got a text: reply takes one"),
        (["walk"], {"temperature": -1}, "temperature >= 0"),
        (["walk"], {"top_p": 0}, "0 < top_p <= 1"),
        (["walk"], {"top_k": -1}, "top_k >= 0"),
        (["walk"], {"cache_implementation": "offloaded"}, "must be static or left out"),
        (["walk"], {"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
    ],
)
def test_what_generate_refuses(policy, conversations, settings, words):
    with pytest.raises(InputError, match=words):
        policy.generate(conversations, **settings)


@pytest.mark.parametrize(("made", "used"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_an_adapter_that_nothing_trained_is_the_hard_prompt_in_any_dtype(gemma_folder, tmp_path, prompts, made, used):
    """Its KL is 0, not the rounding of another dtype; one that was trained is left as it is."""
    PrefixTuningPolicyModel.from_hard_prompt(gemma_folder, HARD_PROMPT, dtype=made).save_pretrained(tmp_path / "start")
    policy = PrefixTuningPolicyModel.from_pretrained(tmp_path / "start", dtype=used)
    policy.add_hard_prompt()
    assert torch.equal(soft_prefix(policy.model), hard_prefix(policy.model))
    policy.save_pretrained(tmp_path / "again")  # still nothing but converted
    other = PrefixTuningPolicyModel.from_pretrained(tmp_path / "again", dtype=made)
    assert fingerprint(other.model) == other.prefix.start
    with torch.no_grad():
        soft_prefix(policy.model)[0, 0] += 1e-3
    policy.save_pretrained(tmp_path / "trained")
    trained = PrefixTuningPolicyModel.from_pretrained(tmp_path / "trained", dtype=made)
    assert torch.equal(soft_prefix(trained.model), soft_prefix(policy.model))


def test_one_process_has_one_device(gemma_folder, policy_adapter, base):
    """A model spread over several is refused with the reason; so is what transformers would swallow."""
    for make in (
        lambda **given: PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, **given),
        lambda **given: PrefixTuningPolicyModel.from_pretrained(policy_adapter, **given),
        lambda **given: PrefixTuningPolicyModel.from_hard_prompt(base, HARD_PROMPT, **given),
    ):
        with pytest.raises(InputError, match="device_map is not taken: it spreads one process"):
            make(device_map="auto")
        with pytest.raises(InputError, match="load_in_8bit is not taken"):
            make(load_in_8bit=True)
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(InputError, match="the model lies on several devices by device_map: "):
        PrefixTuningPolicyModel.from_hard_prompt(base, HARD_PROMPT)
