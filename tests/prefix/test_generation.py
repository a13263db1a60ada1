import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import HARD_PROMPT, WINDOW, sample_context
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, LlamaConfig

from h2s.prefix import generation
from h2s.prefix.adapter import hard_prompt_active, prefix_from_hard_prompt, soft_prefix
from h2s.prefix.generation import Batch, Sampling, completion_logps, decode, generate, seeded, stop_token_ids
from h2s.prefix.prompts import encode_prompts

PAD = 0
LONG = [{"role": "user", "content": "I went for a long walk. " * 12}]


@pytest.fixture(scope="module")
def reference(gemma_folder):
    """The base model as transformers loads it, in float64, and its own tokenizer: the independent path."""
    model = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(gemma_folder)


@pytest.fixture
def model(policy):
    return policy.model


@pytest.fixture
def ragged(policy):
    """Prompts and completions of unlike lengths: token ids, some far beyond the window; and their contexts."""
    contexts = [*(sample_context(i) for i in range(5)), LONG]
    prompts = encode_prompts(policy.tokenizer, policy.prefix, contexts)
    draw = torch.Generator().manual_seed(1)
    completions = [torch.randint(6, 320, (n,), generator=draw).tolist() for n in (7, 1, 12, 40, 3, 9)]
    completions[0][-1] = 5  # a stop token is part of the action
    return prompts, completions, contexts


@pytest.fixture
def batch(policy, ragged) -> Batch:
    return Batch.from_rows(policy.tokenizer, *ragged[:2], torch.device("cpu"))


@torch.no_grad()
def reference_row(reference, context, completion, temperature=1.0):
    """One row, unpadded, with the hard prompt as text: log-probabilities, entropies, last prompt hidden state."""
    model, tokenizer = reference
    messages = [{"role": "system", "content": HARD_PROMPT}, *context]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    output = model(torch.tensor([prompt + completion]), output_hidden_states=True)
    logits = output.logits[0, len(prompt) - 1 : -1].double() / temperature  # the token at t is predicted at t - 1
    distribution = logits.log_softmax(-1)
    logps = distribution[torch.arange(len(completion)), torch.tensor(completion)]
    return logps, -(distribution.exp() * distribution).sum(-1), output.hidden_states[-1][0, len(prompt) - 1]


def on_completions(x, batch):
    return [row[mask] for row, mask in zip(x, batch.completion_mask, strict=True)]


def test_the_ragged_batch_is_one(policy, ragged):
    prompts, completions, _ = ragged
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    assert len(set(lengths)) == len(lengths)
    assert len(policy.prefix.token_ids) + max(lengths) > 4 * WINDOW


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logps_equal_those_of_the_hard_prompt_as_text(model, ragged, batch, reference, temperature):
    _, completions, contexts = ragged
    with torch.no_grad():
        logps, entropy = completion_logps(model, batch, temperature)
    assert logps.dtype == entropy.dtype == torch.float32
    assert logps.shape == entropy.shape == batch.input_ids.shape
    assert not logps[~batch.completion_mask].any() and not entropy[~batch.completion_mask].any()
    rows = zip(on_completions(logps, batch), on_completions(entropy, batch), strict=True)
    for (row_logps, row_entropy), context, completion in zip(rows, contexts, completions, strict=True):
        expected_logps, expected_entropy, _ = reference_row(reference, context, completion, temperature)
        torch.testing.assert_close(row_logps.double(), expected_logps, rtol=0, atol=2e-4)
        torch.testing.assert_close(row_entropy.double(), expected_entropy, rtol=0, atol=2e-4)


def test_logps_one_position_late_or_another_temperature_would_be_seen(ragged, reference):
    """The tolerance above is far below what these defects change."""
    _, completions, contexts = ragged
    right = reference_row(reference, contexts[3], completions[3])[0]
    assert (right[1:] - right[:-1]).abs().median() > 0.1
    assert (right - reference_row(reference, contexts[3], completions[3], 1.7)[0]).abs().median() > 0.1


def test_logps_equal_torchs_linear_cross_entropy(model, ragged, batch):
    """Another implementation of the last step: hidden states of PEFT's own forward, torch's fused loss."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    prompts, completions, _ = ragged
    with torch.no_grad():
        logps = completion_logps(model, batch)[0]
        for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
            hidden = model(torch.tensor([p + c]), output_hidden_states=True).hidden_states[-1][0]
            loss = torch.nn.functional.linear_cross_entropy(
                hidden[len(p) - 1 : -1],
                model.get_base_model().get_output_embeddings().weight,
                torch.tensor(c),
                reduction="none",
            )
            torch.testing.assert_close(logps[row, len(p) : len(p) + len(c)], -loss, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradient_to_the_prefix_equals_that_of_the_peft_model(model, batch, temperature):
    weights = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) * batch.completion_mask
    logps, entropy = completion_logps(model, batch, temperature)
    (ours,) = torch.autograd.grad((weights * (logps + 0.3 * entropy)).sum(), [soft_prefix(model)])

    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float() / temperature
    distribution = logits.log_softmax(-1)
    plain = distribution.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    plain_entropy = -(distribution.exp() * distribution).sum(-1)
    (expected,) = torch.autograd.grad((weights[:, 1:] * (plain + 0.3 * plain_entropy)).sum(), [soft_prefix(model)])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("chunk", [7, 64, 320, 4096])
def test_logps_do_not_depend_on_the_vocabulary_chunk(model, batch, monkeypatch, chunk):
    with torch.no_grad():
        logps, entropy = completion_logps(model, batch)
        monkeypatch.setattr(generation, "VOCABULARY_CHUNK", chunk)
        again, entropy_again = completion_logps(model, batch)
    torch.testing.assert_close(again, logps, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy_again, entropy, rtol=0, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="its peak is read from /proc")
def test_the_logits_of_all_positions_never_exist():
    """Bytes of a process: 256 x 262,144 floats are 268 MB, of which a forward and backward hold several."""
    script = Path(__file__).with_name("peak_bytes.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    ours, naive = json.loads(done.stdout)
    assert ours < 120e6 and naive > 4 * 268e6


def test_logit_softcapping_is_honoured(model, ragged, batch):
    prompts, completions, _ = ragged
    with torch.no_grad():
        uncapped = completion_logps(model, batch)[0]
        model.get_base_model().config.final_logit_softcapping = 1.5
        logps = completion_logps(model, batch)[0]
        logits = model(torch.tensor([prompts[2] + completions[2]])).logits[0].float()
    assert logits.abs().max() <= 1.5
    expected = logits.log_softmax(-1)[len(prompts[2]) - 1 : -1].gather(-1, torch.tensor(completions[2])[:, None])[:, 0]
    at = slice(len(prompts[2]), len(prompts[2]) + len(completions[2]))
    torch.testing.assert_close(logps[2, at], expected, rtol=0, atol=1e-4)
    assert (uncapped - logps).abs().max() > 0.1


def test_logps_under_the_hard_prompt_do_not_follow_the_soft_one(model, ragged, batch, reference):
    _, completions, contexts = ragged
    with torch.no_grad():
        soft_prefix(model).add_(torch.randn(soft_prefix(model).shape, generator=torch.Generator().manual_seed(0)))
        soft = completion_logps(model, batch)[0]
        with hard_prompt_active(model):
            hard = completion_logps(model, batch)[0]
    expected = reference_row(reference, contexts[2], completions[2])[0]
    torch.testing.assert_close(on_completions(hard, batch)[2].double(), expected, rtol=0, atol=2e-4)
    assert (on_completions(soft, batch)[2] - expected).abs().max() > 0.1


# Rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_from_rows_by_hand(tokenizer, side):
    tokenizer.padding_side = side  # whatever the tokenizer itself would do
    batch = Batch.from_rows(tokenizer, [[7, 8, 9], [7]], [[4], [3, 5, 6]], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[7, 8, 9, 4], [7, 3, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.completion_mask.tolist() == [[False, False, False, True], [False, True, True, True]]
    padded = Batch.from_rows(tokenizer, [[7, 8], [7]], [[PAD, 4, 5], [3]], torch.device("cpu"))
    # A pad token that was sampled is a token.
    assert padded.input_ids.tolist() == [[7, 8, PAD, 4, 5], [7, 3, PAD, PAD, PAD]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert padded.completion_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]


def test_rows_trims_without_changing_results(model, batch):
    index = torch.tensor([4, 1, 0])
    part = batch.rows(index)
    assert part.input_ids.shape == (3, int(batch.attention_mask[index].sum(1).max()))
    assert part.input_ids.shape[1] < batch.input_ids.shape[1]
    with torch.no_grad():
        whole, whole_entropy = completion_logps(model, batch)
        logps, entropy = completion_logps(model, part)
    width = part.input_ids.shape[1]
    assert not whole[index, width:].any()
    torch.testing.assert_close(logps, whole[index, :width], rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy, whole_entropy[index, :width], rtol=0, atol=1e-4)


# Stop tokens and text


@pytest.mark.parametrize(
    ("listed", "expected"), [([1, 5], [1, 5]), (7, [1, 5, 7]), (None, [1, 5]), ([9, 1], [1, 5, 9])]
)
def test_stop_tokens(model, tokenizer, listed, expected):
    """The generation config's, <eos> (1) and <end_of_turn> (5)."""
    model.generation_config.eos_token_id = listed
    assert stop_token_ids(model, tokenizer) == expected


def test_decode_drops_the_stop_token_and_nothing_else(tokenizer):
    words = tokenizer("I like tea", add_special_tokens=False).input_ids
    assert decode(tokenizer, [*words, 5], [1, 5]) == "I like tea"
    assert decode(tokenizer, words, [1, 5]) == "I like tea"
    # Its last token may be a stop token that reads as text.
    assert decode(tokenizer, words, [words[-1]]) == tokenizer.decode(words[:-1]).strip() != "I like tea"
    assert decode(tokenizer, [5], [1, 5]) == "" == decode(tokenizer, [], [1, 5])


# Generation


def test_every_setting_of_sampling_is_explicit():
    config = Sampling(9, temperature=0.7).generation_config([1, 5], PAD)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 0, 1.0)
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (9, [1, 5], PAD)
    assert Sampling(9, temperature=0).generation_config([1], PAD).do_sample is False


def first_tokens(model, tokenizer, prompt, sampling, draws):
    torch.manual_seed(0)
    completions = generate(model, tokenizer, [prompt] * draws, sampling, [1, 5]).ids
    assert all(len(c) == 1 for c in completions)
    return torch.tensor([c[0] for c in completions]).bincount(minlength=320)


def chi_square(counts, probabilities):
    """Pearson's statistic in standard deviations above its mean; tokens expected fewer than 5 times are one cell."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_draws_from_the_whole_distribution(model, tokenizer, prompts, reference, temperature):
    """The model's own generation config would keep 3 tokens."""
    assert (model.generation_config.top_k, model.generation_config.top_p) == (3, 0.9)
    with torch.no_grad():
        text = reference[1].apply_chat_template(
            [{"role": "system", "content": HARD_PROMPT}, *sample_context(1)], tokenize=False, add_generation_prompt=True
        )
        ids = reference[1](text, add_special_tokens=False, return_tensors="pt").input_ids
        logits = reference[0](ids).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(-1)
    counts = first_tokens(model, tokenizer, prompts[1], Sampling(1, temperature), draws=4000)
    assert (counts > 0).sum() > 20
    assert chi_square(counts, probabilities) < 4
    assert 0.5 * (counts / 4000 - probabilities).abs().sum() < 0.15
    # The same statistic sees the wrong temperature and the model's own top_k.
    assert chi_square(counts, (logits / (3 - temperature)).softmax(-1)) > 20
    cut = first_tokens(model, tokenizer, prompts[1], Sampling(1, temperature, top_k=3), draws=4000)
    assert chi_square(cut, probabilities) > 20


def test_top_k_and_top_p_are_used_when_asked_for(model, tokenizer, prompts):
    assert (first_tokens(model, tokenizer, prompts[1], Sampling(1, top_k=2), 300) > 0).sum() == 2
    assert (first_tokens(model, tokenizer, prompts[1], Sampling(1, top_p=1e-6), 50) > 0).sum() == 1


def test_completions_end_at_the_first_stop_token(model, tokenizer, prompts):
    stops = list(range(0, 320, 8))
    torch.manual_seed(0)
    completions = generate(model, tokenizer, [p for p in prompts for _ in range(10)], Sampling(12), stops).ids
    ended = [c for c in completions if c[-1] in stops]
    assert len(ended) > 10 and len({len(c) for c in ended}) > 5
    assert all(1 <= len(c) <= 12 and not set(c[:-1]) & set(stops) for c in completions)
    assert all(len(c) == 12 for c in completions if c[-1] not in stops)
    assert any(c[-1] not in stops for c in completions)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
PREFIX, NEW = 20, 12
SIX_LENGTHS = (3, 14, 5, 17, 9, 14)
FAMILIES = {
    "window below prefix": (Gemma3TextConfig, {"sliding_window": 8}),
    "window below prompt": (Gemma3TextConfig, {"sliding_window": 24}),
    "window below both": (Gemma3TextConfig, {"sliding_window": 34}),
    "window of no end": (Gemma3TextConfig, {"sliding_window": 512}),
    "gemma2": (Gemma2Config, {"sliding_window": 8}),
    "no window": (LlamaConfig, {}),
}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_one_call_and_each_row_as_alone(family, cache, tokenizer):
    """What is kept of each step, beside the model's own on prefix and row as text, unpadded."""
    config_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=320, num_hidden_layers=4, max_position_embeddings=256, initializer_range=0.3, **SIZES, **settings
    )
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"  # its softcapping
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    prefix, *prompts = (torch.randint(6, 320, (n,), generator=draw).tolist() for n in (PREFIX, *SIX_LENGTHS))
    model = prefix_from_hard_prompt(base, prefix)
    tokenizer.padding_side = "left"  # whatever the tokenizer itself would do
    passes: list = []
    base.get_decoder().register_forward_hook(lambda module, args, output: passes.append(output[0].shape[:2]))
    with seeded(torch.device("cpu"), 3):
        drawn = generate(model, tokenizer, prompts, Sampling(NEW, temperature=1.5, cache_implementation=cache), [1])
    completions, (logps, entropy) = drawn.ids, drawn.logps_and_entropy
    # One pass over the prompts, one a token.
    assert [tuple(shape) for shape in passes] == [(6, max(SIX_LENGTHS)), *[(6, 1)] * NEW]
    assert max(map(len, completions)) == NEW and len({tuple(c) for c in completions}) == 6
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            output = base(torch.tensor([prefix + prompt + completion]), output_hidden_states=True)
        last = PREFIX + len(prompt) - 1
        lines = (output.logits[0, last:-1].double() / 1.5).log_softmax(-1)
        own = lines.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (logps[row, : len(completion)] - own).abs().max() < 1e-4, row
        assert (entropy[row, : len(completion)] + (lines.exp() * lines).sum(1)).abs().max() < 1e-4, row
        assert (drawn.last_prompt[row] - output.hidden_states[-1][0, last]).abs().max() < 1e-4, row


def test_nothing_of_the_models_own_generation_config_is_taken(model, tokenizer, prompts):
    """Penalties and cutoffs that log-probabilities would not know of; the config stays as it was."""
    sample = lambda **own: generate(model, tokenizer, prompts, Sampling(8), [1, 5], **own).ids  # noqa: E731
    with seeded(torch.device("cpu"), 0):
        expected = sample()
    own = {"repetition_penalty": 5.0, "min_p": 0.5, "suppress_tokens": list(range(6, 200)), "min_new_tokens": 8}
    model.get_base_model().generation_config.update(**own)
    with seeded(torch.device("cpu"), 0):
        assert sample() == expected
    with seeded(torch.device("cpu"), 0):
        assert sample(**own) != expected
    assert model.generation_config.min_p == 0.5


def test_generate_leaves_the_prefix_as_it_was(model, tokenizer, prompts):
    before = soft_prefix(model).detach().clone()
    generate(model, tokenizer, prompts, Sampling(3), [1, 5])
    assert torch.equal(soft_prefix(model), before) and soft_prefix(model).requires_grad


def test_a_seed_holds_inside_and_leaves_the_state_outside():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    draws = {}
    for seed in (7, 8):
        with seeded(device, seed):
            draws[seed] = torch.rand(3)
    with pytest.raises(KeyError), seeded(device, 7):
        assert torch.equal(torch.rand(3), draws[7])
        raise KeyError
    assert not torch.equal(draws[7], draws[8])
    assert torch.equal(torch.get_rng_state(), before)
