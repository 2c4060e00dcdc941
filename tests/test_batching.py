"""Continuous batching gives the tokens of generate(), with pages of the KV cache for the kept attentions alone."""

import copy

import pytest
import torch
from conftest import LAYERS, SKIPS, build_model, make_eas, make_inputs, skip_unless_stock_can
from engines import seen
from transformers import ContinuousBatchingConfig, GenerationConfig

NEW = 8
LENGTHS = (9, 5, 12)  # of three requests; with the new tokens more than twice the sliding window
SETTINGS = {"num_blocks": 8, "max_batch_tokens": 64}


def merged_model(family, skip):
    return make_eas(family, "cpu", SKIPS[skip], "running").merge_and_unload().eval()


def generate_batch(model, family, **options):
    """The new tokens of each request."""
    prompts = [make_inputs(family, "cpu", batch=1, length=n, seed=n)["input_ids"][0].tolist() for n in LENGTHS]
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW)
    settings = ContinuousBatchingConfig(**SETTINGS)
    results = model.generate_batch(prompts, greedy, continuous_batching_config=settings, **options)
    assert len(results) == len(prompts)
    return [result.generated_tokens for result in results.values()]


def generate(model, family):
    """The same by generate(), one by one."""
    tokens = []
    for length in LENGTHS:
        prompt = make_inputs(family, "cpu", batch=1, length=length, seed=length)["input_ids"]
        output = model.generate(prompt, max_new_tokens=NEW, do_sample=False, disable_compile=True)
        tokens.append(output[0, length:].tolist())
    return tokens


@torch.no_grad()
def cache_bytes(model):
    """Size of the KV cache for a fixed number of pages per layer."""
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    settings = ContinuousBatchingConfig(**SETTINGS)
    manager = model.init_continuous_batching(greedy, continuous_batching_config=settings)
    cache = manager._create_batch_processor().cache
    tensors = [cache.cache_tensor] if hasattr(cache, "cache_tensor") else [*cache.key_cache, *cache.value_cache]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("skip", ["first", "half", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_tokens_of_generate(family, skip):
    """In qwen2 and gemma3 every sliding attention is among half of them."""
    base = build_model(family)
    skip_unless_stock_can(lambda: generate_batch(base, family))
    if generate_batch(base, family) != generate(base, family):
        pytest.skip("this transformers gives the stock model other tokens")
    merged = merged_model(family, skip)
    before = copy.deepcopy(merged.config.to_dict())
    expected = generate(merged, family)
    assert generate_batch(merged, family) == expected
    assert merged.config.to_dict() == before
    assert generate(merged, family) == expected  # the model is what it was
    seen("continuous batching", family)


@pytest.mark.parametrize("skip", ["first", "half", "last"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pages_for_kept_attentions_alone(family, skip):
    base, merged = cache_bytes(build_model(family)), cache_bytes(merged_model(family, skip))
    assert merged * LAYERS == base * (LAYERS - len(SKIPS[skip]))


def test_a_manager_that_is_kept():
    merged = merged_model("llama", "half")
    expected = generate(merged, "llama")
    assert generate_batch(merged, "llama", persistent_manager=True) == expected
    manager = merged._cached_continuous_batching_manager
    assert generate_batch(merged, "llama", persistent_manager=True) == expected
    assert merged._cached_continuous_batching_manager is manager
    merged.destroy_cached_continuous_batching_manager()
    assert not hasattr(merged, "_cached_continuous_batching_manager")


def test_the_weights_are_shared():
    merged = merged_model("llama", "half")
    manager = merged.init_continuous_batching(GenerationConfig(eos_token_id=-1))
    own = {parameter.data_ptr() for parameter in merged.parameters()}
    assert {parameter.data_ptr() for parameter in manager.model.parameters()} == own
