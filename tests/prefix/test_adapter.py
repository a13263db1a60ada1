import json

import pytest
import torch
from elsewhere import elsewhere
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import HARD_PROMPT, WINDOW, build_tokenizer, sample_context, save_gemma
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from h2s.errors import InputError
from h2s.models import load_base_model, load_tokenizer, model_source
from h2s.prefix.adapter import (
    SOFT,
    add_hard_prompt,
    hard_prompt_active,
    load_weights,
    prefix_from_hard_prompt,
    read_adapter_config,
    save_adapter,
    save_tokenizer,
    soft_prefix,
)
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, wrap_chat_template
from h2s.prefix.generation import Sampling, generate
from h2s.prefix.prompts import encode_prompts

RELATIVE = 1e-4
NEW_TOKENS = 12
# One token; within the sliding window; about a hundred tokens and far more, both beyond the window of 32.
PROMPTS = {
    "one token": "a",
    "within the window": HARD_PROMPT,
    "a hundred tokens": f"{HARD_PROMPT} 你好。 " * 2 + "I like tea and long books.",
    "many windows": f"{HARD_PROMPT} Did you like the long walk? " * 8,
}
OPENINGS = [None, "start"]
CONTEXTS = [sample_context(i) for i in range(6)] + [[{"role": "user", "content": "I went for a long walk. " * 12}]]


def conversations(opening):
    front = [] if opening is None else [{"role": "assistant", "content": "how was your day?"}]
    return [[*front, *c] for c in CONTEXTS]


def with_hard_prompt(hard_prompt, opening, messages):
    front = [] if opening is None else [{"role": "user", "content": opening}]
    return [{"role": "system", "content": hard_prompt}, *front, *messages]


@pytest.fixture(scope="module")
def stock(gemma_folder):
    """The base model and its tokenizer as transformers loads them: the independent path."""
    model = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(gemma_folder)


def whole_ids(stock_tokenizer, hard_prompt, opening, messages):
    messages = with_hard_prompt(hard_prompt, opening, messages)
    text = stock_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return stock_tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def stock_logits(model, ids, last):
    return model(torch.tensor([ids])).logits[0, -last:]


@torch.no_grad()
def stock_greedy(model, ids):
    """Argmax by argmax over whole forward passes, with neither a cache nor `generate`."""
    ids, new = list(ids), []
    while len(new) < NEW_TOKENS and not set(new) & {1, 5}:
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def make(base, tokenizer, hard_prompt, opening):
    prefix = chat_prefix(tokenizer, hard_prompt, opening)
    wrap_chat_template(tokenizer, prefix)
    model = prefix_from_hard_prompt(base, prefix.token_ids)
    return model, prefix


def assert_equal_logits(soft, hard):
    assert soft.shape == hard.shape
    assert ((soft - hard).abs().max() / hard.abs().max()).item() < RELATIVE


def test_the_prompts_are_of_the_lengths_they_stand_for(tokenizer):
    lengths = [len(chat_prefix(tokenizer, p).token_ids) for p in PROMPTS.values()]
    assert len(tokenizer("a").input_ids) == 1 and lengths[0] < lengths[1] < WINDOW
    assert 80 < lengths[2] < 120 and lengths[3] > 8 * WINDOW


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("hard_prompt", PROMPTS.values(), ids=PROMPTS)
def test_soft_equals_hard(base, tokenizer, stock, hard_prompt, opening):
    model, prefix = make(base, tokenizer, hard_prompt, opening)
    contexts = conversations(opening)
    prompts = encode_prompts(tokenizer, prefix, contexts)
    wholes = [whole_ids(stock[1], hard_prompt, opening, c) for c in contexts]
    hard = [stock_logits(stock[0], w, len(p)) for w, p in zip(wholes, prompts, strict=True)]

    # One row at a time
    for prompt, expected in zip(prompts, hard, strict=True):
        with torch.no_grad():
            assert_equal_logits(model(torch.tensor([prompt])).logits[0], expected)

    # A ragged batch, padded on the right
    width = max(map(len, prompts))
    assert width > 2 * WINDOW and len(set(map(len, prompts))) > 3
    ids = torch.tensor([p + [tokenizer.pad_token_id] * (width - len(p)) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for row, prompt, expected in zip(logits, prompts, hard, strict=True):
        assert_equal_logits(row[: len(prompt)], expected)

    # Greedy generation, by PEFT's own `generate` a row, and by h2s on all rows
    expected = [stock_greedy(stock[0], w) for w in wholes]
    assert len({tuple(e) for e in expected}) > 1
    for prompt, reply in list(zip(prompts, expected, strict=True))[:2]:
        output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert output[0, len(prompt) :].tolist() == reply
    greedy = Sampling(NEW_TOKENS, temperature=0)
    assert generate(model, tokenizer, prompts, greedy, [1, 5]).ids == expected


def test_another_prompt_gives_other_logits(base, tokenizer, stock):
    """The comparison above can fail: the tiny model does listen to its prompt."""
    model, prefix = make(base, tokenizer, HARD_PROMPT, None)
    (prompt,) = encode_prompts(tokenizer, prefix, CONTEXTS[:1])
    other = HARD_PROMPT.replace("kind", "long")
    expected = stock_logits(stock[0], whole_ids(stock[1], other, None, CONTEXTS[0]), len(prompt))
    with torch.no_grad():
        soft = model(torch.tensor([prompt])).logits[0]
    assert ((soft - expected).abs().max() / expected.abs().max()).item() > 100 * RELATIVE


# Loads what was saved with no h2s in sight, and says what it sees.
LOADER = """
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

found = []
for folder, messages in given:
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        logits = model(ids).logits[0]
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    reply = chat(messages, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"][-1]["content"]
    rows = model.get_base_model().get_input_embeddings().weight.shape[0]
    found.append({"logits": logits.tolist(), "reply": reply, "rows": rows, "entries": len(tokenizer)})
""".replace("NEW_TOKENS", str(NEW_TOKENS))
SAVED = {
    "stock": (HARD_PROMPT, None, 0),
    "opening": (HARD_PROMPT, "start", 0),
    "long": (PROMPTS["a hundred tokens"], None, 0),
    "awkward": ("Say %} {{ x }} 🙂 𝔘 \"q\" 'r' \\n.", None, 0),
    "surplus token": (HARD_PROMPT, None, 1),
    "tokenizer that adds bos": (HARD_PROMPT, None, 0),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, gemma_folder):
    """Each of SAVED, saved by h2s and loaded by a process that knows only peft and transformers."""
    folder = tmp_path_factory.mktemp("saved")
    surplus, adding = save_gemma(folder / "surplus-gemma", extra=1), save_gemma(folder / "adding-gemma")
    adds_bos = build_tokenizer()
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    adds_bos.save_pretrained(adding)
    assert load_tokenizer(str(adding))("tea").input_ids[0] == 2
    cases = {}
    for name, (hard_prompt, opening, extra) in SAVED.items():
        source = surplus if extra else adding if "bos" in name else gemma_folder
        tokenizer = load_tokenizer(str(source))
        model, prefix = make(load_base_model(str(source)), tokenizer, hard_prompt, opening)
        save_adapter(model, tokenizer, prefix, folder / name)
        cases[name] = (source, folder / name, conversations(opening)[0])
    seen = elsewhere(LOADER, [(str(f), m) for _, f, m in cases.values()], folder)
    return {name: (*case, result) for (name, case), result in zip(cases.items(), seen, strict=True)}


@pytest.mark.parametrize("name", SAVED)
def test_plain_peft_answers_as_the_hard_prompt(loaded, name):
    source, _, messages, seen = loaded[name]
    hard_prompt, opening, extra = SAVED[name]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    logits = torch.tensor(seen["logits"])
    expected = stock_logits(model, whole_ids(tokenizer, hard_prompt, opening, messages), len(logits))
    assert_equal_logits(logits, expected)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = chat(with_hard_prompt(hard_prompt, opening, messages), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert seen["reply"] == answer[0]["generated_text"][-1]["content"] != ""
    # Not resized: as many rows as the model has of its own, and no more entries than rows.
    assert len(tokenizer) - extra == model.config.vocab_size == seen["rows"]
    assert seen["entries"] <= seen["rows"]


def test_adapter_config_says_where_the_base_is(loaded, gemma_folder):
    config = json.loads((loaded["stock"][1] / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(gemma_folder.resolve())
    assert config["revision"] is None
    assert (config["peft_type"], config["task_type"]) == ("PREFIX_TUNING", "CAUSAL_LM")
    assert config["num_virtual_tokens"] == len(ChatPrefix.load(loaded["stock"][1]).token_ids)


def test_relative_model_folder_is_saved_as_absolute(gemma_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(gemma_folder.parent)
    source = model_source(gemma_folder.name)
    tokenizer = load_tokenizer(source)
    model, prefix = make(load_base_model(source), tokenizer, HARD_PROMPT, None)
    save_adapter(model, tokenizer, prefix, tmp_path)
    assert read_adapter_config(tmp_path, TaskType.CAUSAL_LM).base_model_name_or_path == str(gemma_folder.resolve())


def test_revision_is_saved(base, tmp_path):
    model = prefix_from_hard_prompt(base, [2, 4, 6], revision="abc123")
    model.save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path, TaskType.CAUSAL_LM).revision == "abc123"


def test_saved_folder_holds_what_the_prefix_was(loaded):
    folder = loaded["opening"][1]
    prefix = ChatPrefix.load(folder)
    assert prefix.hard_prompt == HARD_PROMPT
    assert prefix.opening_messages[1:] == [{"role": "user", "content": "start"}]
    assert prefix.text.endswith("start<end_of_turn>\n<start_of_turn>model\n")


def test_only_the_soft_prefix_is_saved_and_trained(policy, tmp_path):
    model, tokenizer, prefix = policy.model, policy.tokenizer, policy.prefix
    hard = model.prompt_encoder["hard_prompt"].embedding.weight
    before = hard.detach().clone()
    assert torch.equal(soft_prefix(model), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"prompt_encoder.{SOFT}.embedding.weight"]

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (prompt,) = encode_prompts(tokenizer, prefix, CONTEXTS[:1])
    model(torch.tensor([prompt])).logits.logsumexp(-1).mean().backward()
    assert hard.grad is None
    optimizer.step()
    # Adam's first step moves every entry that has a gradient by the learning rate.
    moved = (soft_prefix(model) - before).abs()
    assert moved.max().item() == pytest.approx(0.1, rel=1e-3)
    assert torch.equal(hard, before)

    save_adapter(model, tokenizer, prefix, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert list(saved) == ["prompt_embeddings"]
    assert torch.equal(saved["prompt_embeddings"], soft_prefix(model).detach())
    assert not (tmp_path / "hard_prompt").exists()
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".bin", ".pt", ".pth")]


def test_the_hard_prompt_answers_while_it_is_active(policy, stock):
    model, tokenizer, prefix = policy.model, policy.tokenizer, policy.prefix
    torch.nn.init.zeros_(soft_prefix(model))
    (prompt,) = encode_prompts(tokenizer, prefix, CONTEXTS[:1])
    ids = torch.tensor([prompt])
    expected = stock_logits(stock[0], whole_ids(stock[1], HARD_PROMPT, None, CONTEXTS[0]), len(prompt))
    with torch.no_grad():
        before = model(ids).logits[0]
        with hard_prompt_active(model):
            assert_equal_logits(model(ids).logits[0], expected)
        after = model(ids).logits[0]
    assert ((before - expected).abs().max() / expected.abs().max()).item() > 100 * RELATIVE
    assert torch.equal(before, after)
    with pytest.raises(KeyError), hard_prompt_active(model):
        raise KeyError
    assert model.active_adapter == SOFT
    assert soft_prefix(model).requires_grad and not model.prompt_encoder["hard_prompt"].embedding.weight.requires_grad


def test_prefix_is_float32_on_a_bfloat16_base(gemma_folder, tmp_path):
    base = load_base_model(str(gemma_folder), dtype="bfloat16")
    assert base.dtype == torch.bfloat16
    tokenizer = load_tokenizer(str(gemma_folder))
    model, prefix = make(base, tokenizer, HARD_PROMPT, None)
    add_hard_prompt(model, prefix.token_ids)
    assert soft_prefix(model).dtype == torch.float32
    save_adapter(model, tokenizer, prefix, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.float32


def test_prefix_is_the_prompts_keys_and_values(base):
    """The layout by hand: 4 layers of keys and values, 2 heads of 8 each, a row a token."""
    ids = [2, 4, 100, 101, 102]
    model = prefix_from_hard_prompt(base, ids)
    embeddings = soft_prefix(model).detach()
    assert embeddings.shape == (5, 4 * 2 * 2 * 8) and embeddings.dtype == torch.float32
    layer = base.get_decoder().layers[0]
    with torch.no_grad():
        hidden = base.get_decoder().embed_tokens(torch.tensor([ids]))
        values = layer.self_attn.v_proj(layer.input_layernorm(hidden))[0]  # (5, 16), no rotation on values
    # PEFT stores keys and values of layer 0 in the first 32 columns.
    assert torch.allclose(embeddings[:, 16:32], values, atol=1e-5)


def test_load_weights_continues_training(loaded, base):
    folder = loaded["stock"][1]
    model = prefix_from_hard_prompt(base, ChatPrefix.load(folder).token_ids)
    torch.nn.init.zeros_(soft_prefix(model))
    load_weights(model, folder)
    assert torch.equal(soft_prefix(model), load_file(folder / "adapter_model.safetensors")["prompt_embeddings"])
    assert soft_prefix(model).requires_grad


def test_load_weights_of_another_length(loaded, base):
    model = prefix_from_hard_prompt(base, [2, 4, 6])
    with pytest.raises(InputError, match="does not fit this model"):
        load_weights(model, loaded["stock"][1])


# What is no adapter


def lora(base, folder):
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)


def plain_folder(base, folder):
    folder.mkdir()


def without_weights(base, folder):
    prefix_from_hard_prompt(base, [2, 4]).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()


def damaged_config(base, folder):
    prefix_from_hard_prompt(base, [2, 4]).save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


def other_library(base, folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "NO_SUCH_THING"}', encoding="utf-8")
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (plain_folder, "there is no adapter_config.json in it"),
        (without_weights, "there is no adapter_model.safetensors in it"),
        (lora, "it is a .*LORA adapter for .*CAUSAL_LM"),
        (damaged_config, "line 1"),
        (other_library, "NO_SUCH_THING"),
    ],
)
def test_what_is_no_policy_adapter(build, words, base, tmp_path):
    build(base, tmp_path / "adapter")
    with pytest.raises(InputError, match=f"adapter is not a policy adapter.*{words}") as error:
        read_adapter_config(tmp_path / "adapter", TaskType.CAUSAL_LM)
    assert "\n" not in str(error.value)


def test_policy_adapter_is_no_reward_adapter(loaded):
    with pytest.raises(InputError, match=r"is not a reward adapter .*PREFIX_TUNING adapter for .*CAUSAL_LM"):
        read_adapter_config(loaded["stock"][1], TaskType.SEQ_CLS)


# The tokenizer beside it


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_saved_tokenizer_has_no_more_entries_than_the_embeddings(extra, tmp_path):
    tokenizer = build_tokenizer(extra)
    rows = len(tokenizer) - extra
    save_tokenizer(tokenizer, tmp_path, rows)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert len(saved) == rows
    assert max(saved.get_vocab().values()) == rows - 1
    text = "<bos>how was it, 你好 🙂<end_of_turn>"
    assert saved(text).input_ids == tokenizer(text).input_ids
    assert saved.pad_token_id == tokenizer.pad_token_id and saved.eos_token_id == tokenizer.eos_token_id
    assert saved.chat_template == tokenizer.chat_template


def test_tokenizer_whose_own_vocabulary_is_too_large_is_refused(tmp_path):
    tokenizer = build_tokenizer(extra=1)
    with pytest.raises(InputError, match=f"{len(tokenizer) - 1} entries for {len(tokenizer) - 3} embedding rows"):
        save_tokenizer(tokenizer, tmp_path, len(tokenizer) - 3)
