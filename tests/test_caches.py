"""Every KV cache of transformers serves a model with skipped attentions, and what is done to a cache is done to it."""

import copy
import pickle

import pytest
import torch
from conftest import (
    SKIPS,
    add_eas,
    build_model,
    difference,
    logits,
    make_eas,
    make_inputs,
    needs_sound_caches,
    skip_unless_stock_can,
)
from families import ARCHITECTURES
from peft import get_peft_model
from test_generation import LENGTH, NEW, TOLERANCE, generate
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer
from transformers.integrations import executorch

from peft_eas import EASConfig
from peft_eas.runtime.skipped import advance_cache

MODES = ["prompt", "running", "merged prompt", "merged running"]
BACKENDS = {"fp8": {}, "quanto": {"q_group_size": 8}, "hqq": {"q_group_size": 8}}


def make(family, mode, skip="half"):
    context = "prompt" if "prompt" in mode else "running"
    model = make_eas(family, "cpu", SKIPS[skip], context)
    return model.merge_and_unload(context=context) if "merged" in mode else model


def without_output(base, family, layers):
    """The stock model whose attentions of `layers` are computed, and add nothing."""
    for i in layers:
        block = base.transformer.h[i] if family == "gpt2" else base.model.layers[i]
        projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
        for parameter in projection.parameters():
            parameter.data.zero_()
    return base


def needs_backend(backend):
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("before transformers 5.24 there is no such cache")
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("skip", ["first", "half", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_quantised_cache(family, backend, skip, options):
    """The kept attentions' keys are quantised as in the stock model that computes the others for nothing."""
    needs_backend(backend)
    residual = {} if backend == "fp8" else {"residual_length": 4, **BACKENDS[backend]}
    options = {**options, "cache_implementation": "quantized", "cache_config": {"backend": backend, **residual}}
    inputs = make_inputs(family, "cpu", length=LENGTH)
    stock = without_output(build_model(family), family, SKIPS[skip])
    expected = generate(stock, inputs, **options)
    identity = {"init_weights": True, "attention_r": 0}
    model = add_eas(build_model(family), family, SKIPS[skip], "running", **identity)
    for which in (model, model.merge_and_unload()):
        actual = generate(which, inputs, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


class ExactLayer(QuantizedLayer):
    """A layer that keeps what it quantises as it is, and refuses what cannot be quantised."""

    def _quantize(self, tensor, axis):
        assert tensor.numel() > 0
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


@pytest.mark.parametrize("skip", ["first", "half", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_quantised_cache_without_loss(family, mode, skip):
    model, inputs = make(family, mode, skip), make_inputs(family, "cpu", length=LENGTH)

    def new_cache():
        return cache_utils.Cache([ExactLayer(residual_length=3) for _ in range(4)])

    for options in ({}, {"num_beams": 3}):
        skip_unless_stock_can(
            lambda options=options: generate(build_model(family), inputs, past_key_values=new_cache(), **options)
        )
        expected = generate(model, inputs, **options)
        cache = new_cache()
        actual = generate(model, inputs, past_key_values=cache, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE
        assert all(int(cache.get_seq_length(i)) == LENGTH + NEW - 1 for i in range(4))


@pytest.fixture
def offloading(monkeypatch):
    """Lets a cache be offloaded on a CPU: a layer that is away serves nobody until it is fetched."""

    class Stream:
        def wait_stream(self, stream):
            pass

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    offloaded = []

    def offload(layer):
        layer.is_away = True
        offloaded.append(layer)

    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", lambda layer: setattr(layer, "is_away", False))
    for layer_class in (DynamicLayer, cache_utils.DynamicSlidingWindowLayer, StaticLayer):

        def update(layer, *args, stock=layer_class.update, **kwargs):
            assert not getattr(layer, "is_away", False)
            return stock(layer, *args, **kwargs)

        monkeypatch.setattr(layer_class, "update", update)
    return offloaded


@pytest.mark.parametrize("skip", ["first", "half", "last", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_offloaded_cache_fetches_the_layers_behind_skipped_ones(family, mode, skip, offloading):
    model, inputs = make(family, mode, skip), make_inputs(family, "cpu", length=LENGTH)
    expected = generate(model, inputs)
    for options in ({"cache_implementation": "offloaded"}, {"cache_implementation": "offloaded_static"}):
        actual = generate(model, inputs, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE
    actual = generate(model, inputs, past_key_values=DynamicCache(offloading=True))
    assert torch.equal(actual.sequences, expected.sequences)
    assert offloading


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "llama4", "deepseek_v3"])
@pytest.mark.parametrize("context", ["running", "prompt"])
def test_static_caches_of_other_families(name, context):
    """Chunks of attention, latents, and the cache of an encoder-decoder, which is two."""
    family = ARCHITECTURES[name]
    names = get_peft_model(family.build(), EASConfig(num_skip=0)).base_model.candidates
    config = EASConfig(skipped_modules=names[::2], context=context, init_weights=False, r=8, attention_r=4)
    model, inputs = get_peft_model(family.build(), config).eval(), family.make_inputs(length=LENGTH)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    skip_unless_stock_can(lambda: family.build().generate(**inputs, **settings, cache_implementation="static"))
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation="static"), expected)
    merged = model.merge_and_unload(context=context)
    assert torch.equal(merged.generate(**inputs, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("way", ["convert_and_export_with_cache", "TorchExportableModuleForDecoderOnlyLM"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_exports_for_executorch(family, way):
    """Their static cache is made beforehand, with heads for every layer; it serves up to the sliding window."""
    merged = make(family, "merged running", skip="first")
    prompt = make_inputs(family, "cpu", batch=1, length=3)["input_ids"]
    expected = merged.generate(prompt, do_sample=False, max_new_tokens=3, disable_compile=True)[0].tolist()
    settings = merged.generation_config
    settings.use_cache, settings.cache_implementation = True, "static"
    settings.cache_config = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    if way == "convert_and_export_with_cache":
        exported = executorch.convert_and_export_with_cache(merged, strict=False)
    else:
        wrapped = executorch.TorchExportableModuleForDecoderOnlyLM(merged, batch_size=1, max_cache_len=16)
        first = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
        exported = wrapped.export(**first, strict=False)
    step, tokens = exported.module(), prompt[0].tolist()
    for position in range(len(expected) - 1):
        output = step(input_ids=torch.tensor([[tokens[position]]]), cache_position=torch.tensor([position]))
        if position + 1 == len(tokens):
            tokens.append(int(output[0, -1].argmax()))
    assert tokens == expected


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", ["whisper", "bart", "t5"])
def test_the_cache_of_skipped_cross_attentions_is_handed_out(name, num_beams):
    """Whisper's generate() takes it apart by samples, and reads every slot."""
    family = ARCHITECTURES[name]
    names = get_peft_model(family.build(), EASConfig(num_skip=0)).base_model.candidates
    crossing = [mha for mha in names if mha.endswith(("encoder_attn", "EncDecAttention"))]
    config = EASConfig(skipped_modules=crossing[:1], context="running", init_weights=False, r=8, attention_r=4)
    model, inputs = get_peft_model(family.build(), config).eval(), family.make_inputs(length=LENGTH)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(**inputs, **settings)
    for which in (model, model.merge_and_unload()):
        output = which.generate(**inputs, **settings, return_dict_in_generate=True)
        assert torch.equal(output.sequences[:, -expected.shape[1] :], expected)  # Whisper hands out its start as well
        slots = output.past_key_values.cross_attention_cache.layers
        assert len({slot.keys.shape[0] for slot in slots}) == 1
        assert {slot.keys.shape[1] for slot in slots} == {0, 4}


def next_logits(model, ids, length, cache):
    mask = torch.ones(len(ids), length + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


CHANGES = {
    "crop": (lambda cache: cache.crop(-2), lambda ids: ids[:, :-2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[1:]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda ids: ids.flip(0)),
    "copy": (copy.deepcopy, lambda ids: ids),
}


@needs_sound_caches
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", ["first", "half", "all"])
def test_what_is_done_to_a_cache(skip, mode, change, quantised):
    """Going on from a changed cache gives what the changed sequences give without a cache."""
    if quantised and change in ("crop", "select", "repeat"):
        pytest.skip("not defined for such a cache")
    model, ids = make("llama", mode, skip), make_inputs("llama", "cpu", length=LENGTH)["input_ids"]
    cache = cache_utils.Cache([ExactLayer(residual_length=3) for _ in range(4)]) if quantised else DynamicCache()
    # The prompt is what the first pass sees; what is cropped is an answer.
    next_logits(model, ids[:, :6], 0, cache)
    next_logits(model, ids[:, 6:], 6, cache)
    to_cache, to_ids = CHANGES[change]
    cache, seen = to_cache(cache) or cache, to_ids(ids)
    more = to_ids(make_inputs("llama", "cpu", length=4, seed=5)["input_ids"])
    actual = next_logits(model, more, seen.shape[1], cache)
    whole = torch.cat([seen, more], dim=1)
    inputs = {"input_ids": whole, "use_cache": False}
    if "prompt" in mode:
        inputs["eas_prompt_mask"] = torch.arange(whole.shape[1]).expand_as(whole) < 6
    assert difference(actual, logits(model, inputs)[:, seen.shape[1] :]) <= TOLERANCE


@needs_sound_caches
@pytest.mark.parametrize("quantised", [False, True])
def test_a_cache_serves_another_skip_set_once_it_is_reset(quantised):
    model = get_peft_model(
        build_model("llama"), EASConfig(num_skip=2, r=8, attention_r=4, init_weights=False, context="running")
    ).eval()
    names, ids = model.candidates, make_inputs("llama", "cpu", length=LENGTH)["input_ids"]
    cache = cache_utils.Cache([ExactLayer(residual_length=3) for _ in range(4)]) if quantised else DynamicCache()
    model.set_skipped_modules(names[:2])
    next_logits(model, ids, 0, cache)
    model.set_skipped_modules(names[2:])
    with pytest.raises(ValueError, match=r"attention of one of its layers was skipped.*another skip set.*new cache"):
        next_logits(model, ids[:, :1], LENGTH, cache)
    cache.reset()
    next_logits(model, ids[:, :6], 0, cache)
    actual = next_logits(model, ids[:, 6:], 6, cache)
    assert difference(actual, logits(model, {"input_ids": ids})[:, 6:]) <= TOLERANCE
    model.set_skipped_modules(names[:2])
    with pytest.raises(ValueError, match=r"holds keys of layer 0, whose attention is skipped now.*new cache"):
        next_logits(model, ids[:, :1], LENGTH, cache)


def test_a_cache_is_pickled():
    model, ids = make("llama", "merged running", "first"), make_inputs("llama", "cpu", length=LENGTH)["input_ids"]
    cache = DynamicCache()
    next_logits(model, ids[:, :6], 0, cache)
    actual = next_logits(model, ids[:, 6:], 6, pickle.loads(pickle.dumps(cache)))
    assert difference(actual, logits(model, {"input_ids": ids})[:, 6:]) <= TOLERANCE


def test_a_slot_that_a_linear_attention_shares_is_refused():
    cache = cache_utils.Cache([cache_utils.LinearAttentionAndFullAttentionLayer()])
    with pytest.raises(ValueError, match=r"layer 0 is skipped, but shares its slot.*exclude_modules.*use_cache=False"):
        advance_cache(cache, 0, torch.zeros(1, 3, 4))
