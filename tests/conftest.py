"""Tiny random models with the shapes that matter: Gemma 3's sliding and full layers, a BERT, chat templates, data."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models gain nothing from a second thread, and processes that share two cores lose much by it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pandas as pd
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

from h2s.chat_prefix import chat_prefix, encode_prompts, wrap_chat_template
from h2s.prefix import add_hard_prompt, load_base_model, load_tokenizer, prefix_from_hard_prompt

ROOT = Path(__file__).parents[1]
CORPUS = [
    "You are a kind helper. Ask one short question.\n\nI went for a walk today. How was it?\n",
    "start User: Assistant: hello there, what did you do? I like tea and long books.\n\n\n",
    "你好，今天天氣如何？我覺得還好，不會到很熱。",
]
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for turn in turns -%}"
    "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('turns alternate') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\n' -}}"
    "{{- first if loop.first else '' -}}{{- turn['content'] | trim -}}{{- '<end_of_turn>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
WINDOW = 32
HARD_PROMPT = "You are a kind helper. Ask one short question."
WORDS = ["walk", "tea", "book", "rain", "work", "cat", "song", "run", "soup", "trip", "film", "game"]


def build_tokenizer(extra: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Gemma's special tokens; `extra` added tokens beyond what the model embeds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.add_tokens([AddedToken(f"<image_{i}>", special=True) for i in range(extra)])
    return fast


def save_gemma(folder: Path, extra: int = 0, positions: int = 1024) -> Path:
    tokenizer = build_tokenizer(extra)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer) - extra,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.3,
    )
    model = Gemma3ForCausalLM(config)
    # As Gemma's: sampling that is not told otherwise would keep the likeliest tokens only.
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.9, eos_token_id=[1, 5], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    characters = sorted(
        {c for text in CORPUS for c in text if not c.isspace()} | set("abcdefghijklmnopqrstuvwxyz.?!'0123456789")
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *characters, *(f"##{c}" for c in characters)]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = BertTokenizerFast(tokenizer_object=core)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sample_context(i: int) -> list[dict[str, str]]:
    """Conversations of unlike lengths, each beginning in its own way."""
    first = f"{WORDS[i % len(WORDS)]} number {i}" + " and more" * (i % 4)
    context = [{"role": "user", "content": first}]
    if i % 3 == 0:
        context += [{"role": "assistant", "content": "what did you do?"}, {"role": "user", "content": "I ran."}]
    return context


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    return save_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def loud_bert(bert_folder, tmp_path_factory) -> str:
    """The tiny BERT with ten times its weights: as it is, it makes nearly the same of every text."""
    folder = tmp_path_factory.mktemp("models") / "loud-bert"
    model = BertForSequenceClassification.from_pretrained(bert_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    load_tokenizer(str(bert_folder)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(gemma_folder):
    return load_base_model(str(gemma_folder), dtype="float32")


@pytest.fixture
def tokenizer(gemma_folder):
    return load_tokenizer(str(gemma_folder))


@pytest.fixture
def policy_parts(base, tokenizer):
    """A prefix model with its frozen hard prompt, the wrapped tokenizer, and the prefix."""
    prefix = chat_prefix(tokenizer, HARD_PROMPT)
    wrap_chat_template(tokenizer, prefix)
    ids = prefix.token_ids
    model = prefix_from_hard_prompt(base, ids)
    add_hard_prompt(model, ids)
    return model, tokenizer, prefix


@pytest.fixture
def prompts(policy_parts):
    _, tokenizer, prefix = policy_parts
    return encode_prompts(tokenizer, prefix, [sample_context(i) for i in range(6)])


@pytest.fixture(scope="session")
def contexts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "contexts.json"
    pd.Series([{"context": sample_context(i)} for i in range(40)]).to_json(file, orient="records", force_ascii=False)
    return file


@pytest.fixture(scope="session")
def sheet_file(tmp_path_factory) -> Path:
    """Judgements by a rule: the reply that asks is better. Two rows a conversation; some without direction."""
    rows = []
    for i in range(40):
        asks, tells = f"how was the {WORDS[i % 12]}?", f"i like the {WORDS[(i + 5) % 12]}."
        rows.append([str(sample_context(i)), asks, tells, 0])
        rows.append([str(sample_context(i)), tells, asks, 1])
    rows.append([str(sample_context(3)), "nice.", "good.", 2])
    rows.append([str(sample_context(4)), "and you?", "what is it?", 3])
    file = tmp_path_factory.mktemp("data") / "judgements.xlsx"
    columns = ["context_messages", "policy_response", "reference_response", "human_eval"]
    pd.DataFrame(rows, columns=columns).to_excel(file, index=False)
    return file
