"""Tiny random models with the shapes that matter: Gemma 3's sliding and full layers, encoders, chat templates, data."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PrefixTuningConfig, TaskType
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ElectraConfig,
    ElectraForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from h2s.models import load_tokenizer
from h2s.reward.encoder import add_reward_prefix, load_encoder
from h2s.reward.model import RewardModel

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
COLUMNS = ["context_messages", "policy_response", "reference_response", "human_eval"]
GOOD_ROW = ["hello", "how was it?", "I see.", 0]
RECIPES = ("convert_prompt", "train_reward", "train_policy", "train_dpo", "generate", "compare")
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


def save_gemma(folder: Path, extra: int = 0, positions: int = 1024, **sizes: Any) -> Path:
    """A tiny Gemma 3 with its tokenizer; `sizes` are settings of its configuration."""
    tokenizer = build_tokenizer(extra)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer) - extra,
        **{"hidden_size": 32, "intermediate_size": 48, "head_dim": 8} | sizes,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
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


CHARACTERS = sorted(
    {c for text in CORPUS for c in text if not c.isspace()} | set("abcdefghijklmnopqrstuvwxyz.?!'0123456789")
)


def bert_tokenizer() -> BertTokenizerFast:
    """WordPiece: each of `WORDS` is one token, all else its characters."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return BertTokenizerFast(tokenizer_object=core)


def roberta_tokenizer() -> RobertaTokenizer:
    """Byte-level BPE with RoBERTa's special tokens in their places."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*CORPUS, *(f" {word} {word}" for word in WORDS)], trainer)
    bpe = json.loads(core.to_str())["model"]
    return RobertaTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])


def xlm_roberta_tokenizer() -> XLMRobertaTokenizer:
    """Unigram with XLM-R's special tokens in their places; each of `WORDS` is one token."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return XLMRobertaTokenizer(vocab=[*pieces, *((c, -5.0) for c in ["▁", *CHARACTERS]), ("<mask>", 0.0)])


def save_encoder(folder: Path, model_class: type, config_class: type, tokenizer, **settings) -> Path:
    """An encoder of two layers and 128 positions."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        num_labels=1,
        **settings,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    return save_encoder(folder, BertForSequenceClassification, BertConfig, bert_tokenizer())


# The families beside BERT, with weights ten times as large as they begin: else a tiny encoder makes nearly the same of
# every text.
ENCODERS = {
    "electra": (ElectraForSequenceClassification, ElectraConfig, bert_tokenizer, {"embedding_size": 16}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, roberta_tokenizer, {"type_vocab_size": 1}),
    "xlm-roberta": (
        XLMRobertaForSequenceClassification,
        XLMRobertaConfig,
        xlm_roberta_tokenizer,
        {"type_vocab_size": 1},
    ),
}


def save_loud_encoder(folder: Path, family: str) -> Path:
    model_class, config_class, tokenizer, settings = ENCODERS[family]
    return save_encoder(folder, model_class, config_class, tokenizer(), initializer_range=0.2, **settings)


def sample_context(i: int) -> list[dict[str, str]]:
    """Conversations of unlike lengths, each beginning in its own way."""
    first = f"{WORDS[i % len(WORDS)]} number {i}" + " and more" * (i % 4)
    context = [{"role": "user", "content": first}]
    if i % 3 == 0:
        context += [{"role": "assistant", "content": "what did you do?"}, {"role": "user", "content": "I ran."}]
    return context


# The recipes' own `main`, on recipes that are right but for what a test changes


class ModelLoads(BaseException):
    """A model is about to load. (No Exception: a recipe's `main` reports those.)"""


def says(line, *words):
    assert all(w in line for w in words), line


def sheet(folder, rows, columns=COLUMNS, name="sheet.xlsx"):
    pd.DataFrame(rows, columns=columns).to_excel(folder / name, index=False)
    return {"path": str(folder / name)}


def contexts(folder, items):
    file = folder / "contexts.json"
    file.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return {"path": str(file)}


def turns(*roles):
    return [{"role": r, "content": f"{r} says"} for r in roles]


def build_reward_model(folder, virtual: int = 4, max_tokens: int = 100, seed: int = 0) -> RewardModel:
    """An untrained reward model on a tiny BERT."""
    torch.manual_seed(seed)
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=virtual)
    model = add_reward_prefix(load_encoder(str(folder)), config)
    return RewardModel(model, load_tokenizer(str(folder)), max_tokens)
