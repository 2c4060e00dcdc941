"""Generation is right with any set skipped: every way to generate gives the logits of one full forward pass."""

import copy
import warnings

import pytest
import torch
from conftest import (
    DECODERS,
    IMAGE_TOKEN,
    LAYERS,
    SKIPS,
    WINDOW,
    add_eas,
    build_model,
    difference,
    logits,
    make_eas,
    make_inputs,
    mha_names,
    needs_sound_caches,
    skip_unless_stock_can,
)
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache, StaticCache

from peft_eas import EASConfig

TEXT = [*DECODERS, "llava"]
# How the model is used: context from the prompt or frozen, and the same merged.
MODES = ["prompt", "running", "merged prompt", "merged running"]
BY_PROMPT = ["prompt", "merged prompt"]
SOME_SKIPS = ["first", "half", "all"]
LENGTH, NEW = 9, 8  # together more than twice the sliding window
TOLERANCE = 2e-5
assert LENGTH > WINDOW

every_model = pytest.mark.parametrize(
    ("family", "skip", "mode"),
    # These differ from llama and from gemma3 only within their attention.
    [(f, s, m) for f in DECODERS for s in (["half"] if f in ("qwen3", "gemma2") else SOME_SKIPS) for m in MODES],
)
every_family = pytest.mark.parametrize(("family", "mode"), [(f, m) for f in DECODERS for m in MODES])


@pytest.fixture(scope="module")
def models(device):
    """Models by (family, skip, mode), each made once."""
    made = {}

    def get(family, skip, mode):
        if (family, skip, mode) not in made:
            context = "prompt" if mode in BY_PROMPT else "running"
            model = make_eas(family, device, SKIPS[skip], context)
            made[family, skip, mode] = model.merge_and_unload(context=context) if "merged" in mode else model
        return made[family, skip, mode]

    return get


def generate(model, inputs, new=NEW, **options):
    """Greedy generation of `new` tokens by default, with the raw logits of every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*generation flags.*|.*num_beams.*")
        return model.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": new, "disable_compile": True, **options},
            suppress_tokens=[IMAGE_TOKEN],
            return_dict_in_generate=True,
            output_logits=True,
        )


def full_forward(model, mode, sequences, prompt_length, **inputs):
    """Logits of one pass over `sequences` without a cache, at the positions that generation predicts from.

    Where the context is the prompt's, it is marked from outside, independent of how generation finds it.
    """
    if mode in BY_PROMPT:
        mask = torch.zeros_like(sequences, dtype=torch.bool)
        mask[:, :prompt_length] = True
        if "attention_mask" in inputs:
            mask &= inputs["attention_mask"].bool()
        inputs["eas_prompt_mask"] = mask
    return logits(model, {"input_ids": sequences, "use_cache": False, **inputs})[:, prompt_length - 1 : -1]


def check_against_full_forward(model, mode, output, length=LENGTH, **inputs):
    """Asserts that each step's logits are those of the full pass over what was generated in the end."""
    steps = torch.stack(output.logits, dim=1)
    expected = full_forward(model, mode, output.sequences, length, **inputs)
    assert steps.shape == expected.shape
    assert difference(steps, expected) <= TOLERANCE
    return steps


# --- the models here are sensitive to mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("skip", ["none", "first", "half"])
def test_wrong_positions_masks_and_contexts_would_show(family, skip, models, device):
    model = models(family, skip, "prompt")
    inputs = make_inputs(family, device, length=17)
    positions = torch.arange(17, device=device)[None].repeat(2, 1)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, :LENGTH] = True
    expected = logits(model, {**inputs, "position_ids": positions, "eas_prompt_mask": mask})
    shifted = positions.clone()
    shifted[:, -1] += 1
    assert difference(logits(model, {**inputs, "position_ids": shifted, "eas_prompt_mask": mask}), expected) > 1e-3
    hidden = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    hidden["attention_mask"][:, -3] = 0
    actual = logits(model, {**hidden, "position_ids": positions, "eas_prompt_mask": mask})
    assert difference(actual[:, -1], expected[:, -1]) > 1e-3
    mask = mask.clone()
    mask[:, LENGTH] = True
    assert difference(logits(model, {**inputs, "eas_prompt_mask": mask}), expected) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_window_would_show(family, models, device):
    model = models(family, "half", "running")
    wide = make_eas(family, device, SKIPS["half"], "running")
    wide_model = build_model(family, device, sliding_window=64)
    wide = add_eas(wide_model, family, SKIPS["half"], "running", warm=False)
    wide.load_state_dict(model.state_dict())
    inputs = make_inputs(family, device, length=17)
    a, b = logits(model, inputs), logits(wide, inputs)
    assert difference(a[:, :WINDOW], b[:, :WINDOW]) <= 1e-6
    # In qwen2 every sliding layer is among those skipped.
    assert (difference(a[:, WINDOW:], b[:, WINDOW:]) > 1e-3) == (family == "mistral")


# --- cached = uncached -----------------------------------------------------------------------------------------------


@every_model
def test_cached_is_uncached(family, skip, mode, models, device):
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    cached = generate(model, inputs)
    assert cached.sequences.shape == (2, LENGTH + NEW)
    steps = check_against_full_forward(model, mode, cached)
    uncached = generate(model, inputs, use_cache=False)
    assert torch.equal(uncached.sequences, cached.sequences)
    assert difference(torch.stack(uncached.logits, dim=1), steps) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", SOME_SKIPS)
def test_cached_is_uncached_with_images(skip, mode, models, device):
    model = models("llava", skip, mode)
    inputs = make_inputs("llava", device, length=LENGTH)
    cached = generate(model, inputs)
    check_against_full_forward(model, mode, cached, pixel_values=inputs["pixel_values"])
    uncached = generate(model, inputs, use_cache=False)
    assert torch.equal(uncached.sequences, cached.sequences)


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", TEXT)
def test_merged_generates_as_unmerged(family, skip, models, device):
    inputs = make_inputs(family, device, length=LENGTH)
    outputs = [generate(models(family, skip, mode), inputs) for mode in ("running", "merged running")]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert difference(torch.stack(outputs[1].logits), torch.stack(outputs[0].logits)) <= TOLERANCE


@every_family
def test_without_an_attention_mask(family, mode, models, device):
    model = models(family, "half", mode)
    inputs = make_inputs(family, device, length=LENGTH)
    expected = generate(model, inputs)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        actual = generate(model, {"input_ids": inputs["input_ids"]}, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@every_family
def test_positional_input_ids(family, mode, models, device):
    model = models(family, "half", mode)
    inputs = make_inputs(family, device, length=LENGTH)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=NEW, do_sample=False), expected)
    assert torch.equal(model.generate(inputs=inputs["input_ids"], max_new_tokens=NEW, do_sample=False), expected)


@every_family
def test_from_embeddings(family, mode, models, device):
    model = models(family, "half", mode)
    inputs = make_inputs(family, device, length=LENGTH)
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    actual = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_attention_implementations(family, attention, models, device):
    model = models(family, "half", "prompt")
    expected = generate(model, make_inputs(family, device, length=LENGTH))
    base = build_model(family, device)
    base.set_attn_implementation(attention)
    other = add_eas(base, family, SKIPS["half"])
    actual = generate(other, make_inputs(family, device, length=LENGTH))
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


# --- batches ---------------------------------------------------------------------------------------------------------


@every_model
def test_left_padded_batch_is_one_by_one(family, skip, mode, models, device):
    model = models(family, skip, mode)
    prompts = [make_inputs(family, device, batch=1, length=n, seed=n)["input_ids"] for n in (LENGTH, 5, 7)]
    padded = torch.cat([nn.functional.pad(p, (LENGTH - p.shape[1], 0), value=7) for p in prompts])
    mask = torch.cat([nn.functional.pad(torch.ones_like(p), (LENGTH - p.shape[1], 0)) for p in prompts])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        together = generate(model, {"input_ids": padded, "attention_mask": mask}, **options)
        steps = torch.stack(together.logits, dim=1)
        for i, prompt in enumerate(prompts):
            alone = generate(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
            assert torch.equal(together.sequences[i, LENGTH:], alone.sequences[0, prompt.shape[1] :])
            assert difference(steps[i], torch.stack(alone.logits, dim=1)[0]) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_padding_found_by_its_token(mode, models, device):
    """Without an attention mask, generate() takes the pad token for padding."""
    model = models("llama", "half", mode)
    inputs = make_inputs("llama", device, length=LENGTH)
    padded = nn.functional.pad(inputs["input_ids"], (3, 0), value=0)
    expected = generate(model, inputs)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        actual = generate(model, {"input_ids": padded}, pad_token_id=0, **options)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


# --- other caches ----------------------------------------------------------------------------------------------------


@every_model
def test_static_cache_is_dynamic_cache(family, skip, mode, models, device):
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    dynamic, static = generate(model, inputs), generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    assert difference(torch.stack(static.logits), torch.stack(dynamic.logits)) <= TOLERANCE


def given_caches(model, device):
    config = model.config.get_text_config()
    return {
        "DynamicCache()": DynamicCache(),
        "DynamicCache(config)": DynamicCache(config=config),
        "StaticCache": StaticCache(config=config, max_cache_len=LENGTH + NEW + 3),
    }


@pytest.mark.parametrize("kind", ["DynamicCache()", "DynamicCache(config)", "StaticCache"])
@every_model
def test_cache_given_by_the_user(family, skip, mode, kind, models, device):
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    cache = given_caches(model, device)[kind]
    expected = generate(model, inputs)
    actual = generate(model, inputs, past_key_values=cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE
    assert int(cache.get_seq_length()) == LENGTH + NEW - 1
    share = (LAYERS - len(SKIPS[skip])) / LAYERS
    if kind == "DynamicCache()":
        sizes = [layer.keys.untyped_storage().nbytes() for layer in cache.layers]
        per_layer = 2 * WIDTHS[family] * (LENGTH + NEW - 1) * 4
        assert sum(sizes) == share * LAYERS * per_layer


# Width of all key heads of one layer together.
WIDTHS = {"llama": 16, "mistral": 16, "qwen2": 16, "qwen3": 16, "gemma2": 16, "gemma3": 16, "gpt2": 32}


@needs_sound_caches
@pytest.mark.parametrize("kind", ["DynamicCache()", "DynamicCache(config)", "StaticCache"])
@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_reset_cache_serves_another_prompt(family, skip, kind, models, device):
    """Nothing of the first prompt is left, its context included."""
    model = models(family, skip, "prompt")
    cache = given_caches(model, device)[kind]
    generate(model, make_inputs(family, device, length=LENGTH, seed=1), past_key_values=cache)
    cache.reset()
    inputs = make_inputs(family, device, length=LENGTH, seed=2)
    expected = generate(model, inputs)
    actual = generate(model, inputs, past_key_values=cache)
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["DynamicCache()", "DynamicCache(config)", "StaticCache"])
@every_model
def test_a_second_turn_on_the_same_cache(family, skip, mode, kind, models, device):
    """With a frozen context or merged, as without a cache. With context='prompt' the first prompt stays the prompt."""
    model = models(family, skip, mode)
    cache = given_caches(model, device)[kind]
    inputs = make_inputs(family, device, length=LENGTH)
    first = generate(model, inputs, new=3, past_key_values=cache)
    turn = make_inputs(family, device, length=3, seed=9)["input_ids"]
    dialogue = torch.cat([first.sequences, turn], dim=1)
    second = generate(
        model, {"input_ids": dialogue, "attention_mask": torch.ones_like(dialogue)}, new=4, past_key_values=cache
    )
    steps = torch.stack(second.logits, dim=1)
    mask = {}
    if mode in BY_PROMPT:
        mask["eas_prompt_mask"] = torch.zeros_like(second.sequences, dtype=torch.bool)
        mask["eas_prompt_mask"][:, :LENGTH] = True
    expected = logits(model, {"input_ids": second.sequences, "use_cache": False, **mask})
    assert difference(steps, expected[:, dialogue.shape[1] - 1 : -1]) <= TOLERANCE


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_copied_cache_branches(family, skip, models, device):
    """One prompt, two continuations, as in prefix caching."""
    model = models(family, skip, "prompt")
    inputs = make_inputs(family, device, length=LENGTH)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    for seed in (3, 4):
        more = make_inputs(family, device, length=2, seed=seed)["input_ids"]
        branch = copy.deepcopy(cache)
        with torch.no_grad():
            mask = torch.ones(2, LENGTH + 2, dtype=torch.long, device=device)
            actual = model(input_ids=more, attention_mask=mask, past_key_values=branch, use_cache=True).logits
        sequences = torch.cat([inputs["input_ids"], more], dim=1)
        prompt = torch.zeros_like(sequences, dtype=torch.bool)
        prompt[:, :LENGTH] = True
        expected = logits(model, {"input_ids": sequences, "eas_prompt_mask": prompt})[:, LENGTH:]
        assert difference(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("mode", ["running", "merged"])
@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", DECODERS)
def test_chunked_prefill(family, skip, mode, models, device):
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    expected = generate(model, inputs)
    for chunk in (2, 4):
        actual = generate(model, inputs, prefill_chunk_size=chunk)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@pytest.mark.parametrize("how", ["argument", "generation_config", "model's generation_config"])
def test_chunked_prefill_does_not_go_with_the_prompt(how, device):
    model = make_eas("llama", device, SKIPS["half"])
    inputs = make_inputs("llama", device, length=LENGTH)
    expected = generate(model, inputs)
    options = {}
    if how == "argument":
        options["prefill_chunk_size"] = 2
    else:
        config = copy.deepcopy(model.generation_config)
        config.prefill_chunk_size = 2
        if how == "generation_config":
            options["generation_config"] = config
        else:
            model.generation_config.prefill_chunk_size = 2
    with pytest.raises(ValueError, match=r"(context='prompt'|whole prompt).*freeze_context\(\)"):
        generate(model, inputs, **options)
    model.generation_config.prefill_chunk_size = None
    actual = generate(model, inputs)
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize("shape", [(LENGTH,), (2, 1, LENGTH), (1, LENGTH), (4, LENGTH), (2, LENGTH - 1)])
def test_a_prompt_mask_of_another_shape_is_refused(shape):
    model, inputs = make_eas("llama", "cpu", SKIPS["half"]), make_inputs("llama", "cpu", length=LENGTH)
    with pytest.raises(ValueError, match=rf"eas_prompt_mask of shape .* tokens of shape \(2, {LENGTH}\)"):
        generate(model, {**inputs, "eas_prompt_mask": torch.ones(shape, dtype=torch.bool)})


# --- beams and samples -----------------------------------------------------------------------------------------------


def log_probs_of(model, mode, sequences, length):
    """Sum of the log-probabilities of the generated tokens, from a full pass."""
    log_probs = full_forward(model, mode, sequences, length).log_softmax(-1)
    return log_probs.gather(2, sequences[:, length:, None]).sum((1, 2))


@every_model
def test_beams(family, skip, mode, models, device):
    """The scores are those of the sequences, and with and without a cache the same."""
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    beams = generate(model, inputs, **options)
    assert beams.sequences.shape == (4, LENGTH + NEW)
    expected = log_probs_of(model, mode, beams.sequences, LENGTH) / NEW
    torch.testing.assert_close(beams.sequences_scores, expected, rtol=1e-4, atol=1e-5)
    for changed in ({"use_cache": False}, {"cache_implementation": "static"}):
        other = generate(model, inputs, **options, **changed)
        assert torch.equal(other.sequences, beams.sequences)
        torch.testing.assert_close(other.sequences_scores, beams.sequences_scores, rtol=1e-4, atol=1e-5)
    for i in range(2):
        alone = generate(model, {name: value[i : i + 1] for name, value in inputs.items()}, **options)
        assert torch.equal(alone.sequences, beams.sequences[2 * i : 2 * i + 2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_beams_over_a_left_padded_batch(family, mode, models, device):
    model = models(family, "half", mode)
    prompts = [make_inputs(family, device, batch=1, length=n, seed=n)["input_ids"] for n in (LENGTH, 5)]
    padded = torch.cat([nn.functional.pad(p, (LENGTH - p.shape[1], 0), value=7) for p in prompts])
    mask = torch.cat([nn.functional.pad(torch.ones_like(p), (LENGTH - p.shape[1], 0)) for p in prompts])
    together = generate(model, {"input_ids": padded, "attention_mask": mask}, num_beams=3, output_scores=True)
    for i, prompt in enumerate(prompts):
        alone = generate(
            model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, num_beams=3, output_scores=True
        )
        assert torch.equal(together.sequences[i, LENGTH:], alone.sequences[0, prompt.shape[1] :])
        torch.testing.assert_close(together.sequences_scores[i], alone.sequences_scores[0], rtol=1e-4, atol=1e-5)


@every_model
def test_several_samples_per_prompt(family, skip, mode, models, device):
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, length=LENGTH)
    torch.manual_seed(3)
    sampled = generate(model, inputs, do_sample=True, num_return_sequences=3, top_k=0)
    assert sampled.sequences.shape == (6, LENGTH + NEW)
    assert len(set(map(tuple, sampled.sequences.tolist()))) > 2
    check_against_full_forward(model, mode, sampled)


# --- assisted decoding -----------------------------------------------------------------------------------------------


def repeating(family, device):
    """A prompt that repeats itself, so that there are candidates to look up."""
    inputs = make_inputs(family, device, batch=1, length=3)
    return {name: value.repeat(1, 3) for name, value in inputs.items()}


@every_model
def test_prompt_lookup(family, skip, mode, models, device):
    model = models(family, skip, mode)
    inputs = repeating(family, device)
    expected = generate(model, inputs, new=16)
    actual = generate(model, inputs, new=16, prompt_lookup_num_tokens=3)
    assert torch.equal(actual.sequences, expected.sequences)
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@needs_sound_caches
@every_model
def test_assistant_model(family, skip, mode, models, device):
    """An assistant that is often wrong, so that candidates are rejected and the cache is cropped."""
    model = models(family, skip, mode)
    inputs = make_inputs(family, device, batch=1, length=LENGTH)
    expected = generate(model, inputs, new=16)
    actual = generate(model, inputs, new=16, assistant_model=build_model(family, device))
    assert torch.equal(actual.sequences, expected.sequences)
    assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


@needs_sound_caches
@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_merged_model_assists_its_base(family, skip, models, device):
    base = build_model(family, device)
    inputs = make_inputs(family, device, batch=1, length=LENGTH)
    expected = generate(base, inputs, new=16)
    actual = generate(base, inputs, new=16, assistant_model=models(family, skip, "merged"))
    assert torch.equal(actual.sequences, expected.sequences)


@needs_sound_caches
@every_family
def test_the_model_is_its_own_assistant(family, mode, models, device):
    """Every candidate is right, so that as few passes as possible are made."""
    model = models(family, "half", mode)
    assistant = model if "merged" in mode else model.base_model.model
    inputs = make_inputs(family, device, batch=1, length=LENGTH)
    expected = generate(model, inputs, new=12)
    actual = generate(model, inputs, new=12, assistant_model=assistant)
    assert torch.equal(actual.sequences, expected.sequences)


@needs_sound_caches
@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_early_exit(family, skip, models, device):
    """The first two layers draft for all four; both fill the same cache."""
    inputs = make_inputs(family, device, batch=1, length=LENGTH)
    skip_unless_stock_can(lambda: generate(build_model(family, device), inputs, assistant_early_exit=2))
    model = models(family, skip, "merged running")
    expected = generate(model, inputs, new=12)
    actual = generate(model, inputs, new=12, assistant_early_exit=2)
    assert torch.equal(actual.sequences, expected.sequences)
    assert model.config.get_text_config().num_hidden_layers == LAYERS


# --- without PeftModel's own generate --------------------------------------------------------------------------------

BYPASSES = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", BYPASSES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("route", ["base model", "no task type", "transformers"])
def test_generate_on_another_route(family, route, options, models, device, tmp_path):
    """On the base model, without a task type, and with an adapter loaded by transformers alone."""
    reference = models(family, "half", "prompt")
    inputs = repeating(family, device)
    expected = generate(reference, inputs, **BYPASSES[options])
    if route == "base model":
        model = reference.base_model.model
    elif route == "no task type":
        model = add_eas(build_model(family, device), family, SKIPS["half"], task_type=None)
        model.load_state_dict(reference.state_dict())
    else:
        reference.save_pretrained(tmp_path)
        model = build_model(family, device)
        model.load_adapter(str(tmp_path))
        model.eval()
    actual = generate(model, inputs, **BYPASSES[options])
    assert torch.equal(actual.sequences, expected.sequences)
    if options != "beams":
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


def test_generate_right_after_training_steps(device):
    """As evaluation within training does; nothing of a training pass is left in the way."""
    model = make_eas("llama", device, SKIPS["half"])
    inputs = make_inputs("llama", device, length=LENGTH)
    expected = generate(model, inputs)
    model.train()
    model(**make_inputs("llama", device), labels=make_inputs("llama", device)["input_ids"]).loss.backward()
    model.eval()
    after = generate(model, inputs)
    assert difference(torch.stack(after.logits), torch.stack(expected.logits)) <= TOLERANCE
    generate(model, inputs, use_cache=False)
    changed = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    assert not torch.equal(generate(model, changed).sequences[:, LENGTH:], after.sequences[:, LENGTH:])


def test_two_generations_do_not_mix(models, device):
    """A call that ended by an error leaves nothing behind."""
    model = models("llama", "half", "prompt")
    inputs = make_inputs("llama", device, length=LENGTH)
    expected = generate(model, inputs)

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    with pytest.raises(Stop):
        generate(model, make_inputs("llama", device, length=4), logits_processor=[stop])
    actual = generate(model, inputs)
    assert torch.equal(actual.sequences, expected.sequences)
    assert (
        torch.equal(logits(model, inputs)[:, -1], actual.logits[0])
        or difference(logits(model, inputs)[:, -1], actual.logits[0]) <= TOLERANCE
    )


def test_generation_during_a_search(device):
    """With the skip set changed between calls."""
    model = get_peft_model(
        build_model("llama", device),
        EASConfig(task_type="CAUSAL_LM", r=8, attention_r=4, dropout=0.0, init_weights=False, num_skip=2),
    ).eval()
    inputs = make_inputs("llama", device, length=LENGTH)
    for layers in ([0, 1], [3], []):
        model.set_skipped_modules(mha_names("llama", layers))
        check_against_full_forward(model, "prompt", generate(model, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_adapters_off(family, models, device):
    model = models(family, "half", "prompt")
    inputs = make_inputs(family, device, length=LENGTH)
    with model.disable_adapter():
        off = generate(model, inputs)
    # Frozen, as under adapters: torch chooses its kernels by that.
    base = generate(build_model(family, device).requires_grad_(False), inputs)
    assert torch.equal(off.sequences, base.sequences)
    assert torch.equal(torch.stack(off.logits), torch.stack(base.logits))
