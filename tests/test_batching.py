"""Continuous batching gives the tokens of generate(), with pages of the KV cache for the kept attentions alone."""

import copy
import itertools

import pytest
import torch
from conftest import LAYERS, skip_unless_stock_can
from engines import seen
from families import ARCHITECTURES, make
from transformers import ContinuousBatchingConfig, GenerationConfig

NEW = 8
LENGTHS = (9, 5, 12)  # of three requests; with the new tokens more than twice the sliding window
SETTINGS = {"num_blocks": 8, "max_batch_tokens": 64}
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gpt2", "olmo2"),
    *("phi3", "smollm3", "starcoder2"),
)


def merged_model(family, skip):
    return make(ARCHITECTURES[family], skip).merge_and_unload().eval()


def prompt(family, length):
    return ARCHITECTURES[family].make_inputs(batch=1, length=length, seed=length)["input_ids"]


def generate_batch(model, family, **options):
    """The new tokens of each request."""
    prompts = [prompt(family, length)[0].tolist() for length in LENGTHS]
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=NEW)
    settings = ContinuousBatchingConfig(**SETTINGS)
    results = model.generate_batch(prompts, greedy, continuous_batching_config=settings, **options)
    assert len(results) == len(prompts)
    return [result.generated_tokens for result in results.values()]


def generate(model, family):
    """The same by generate(), one by one."""
    tokens = []
    for length in LENGTHS:
        output = model.generate(prompt(family, length), max_new_tokens=NEW, do_sample=False, disable_compile=True)
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


@pytest.mark.parametrize(
    ("family", "skip"),
    [*((family, "some") for family in FAMILIES), *itertools.product(["llama", "qwen2", "gemma3"], ["first", "all"])],
)
def test_tokens_of_generate(family, skip):
    """In qwen2 and gemma3 every sliding attention is among some of them."""
    base = ARCHITECTURES[family].build()
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


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "falcon"])
def test_families_whose_stock_model_cannot(family):
    """Their attention gives the cache of pages less than it asks for: every request ends with an error."""
    base = ARCHITECTURES[family].build()
    skip_unless_stock_can(lambda: generate_batch(base, family))
    if any(generate_batch(base, family)):
        pytest.skip("this transformers can")
    assert generate_batch(merged_model(family, "some"), family) == [[]] * len(LENGTHS)
    seen("continuous batching", family, "The stock model, too: every request ends with an error of its cache.")


@pytest.mark.parametrize(("skip", "kept"), [("first", 3), ("some", 2), ("last", 3)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pages_for_kept_attentions_alone(family, skip, kept):
    base, merged = cache_bytes(ARCHITECTURES[family].build()), cache_bytes(merged_model(family, skip))
    assert merged * LAYERS == base * kept


def test_a_manager_that_is_kept():
    merged = merged_model("llama", "some")
    expected = generate(merged, "llama")
    assert generate_batch(merged, "llama", persistent_manager=True) == expected
    manager = merged._cached_continuous_batching_manager
    assert generate_batch(merged, "llama", persistent_manager=True) == expected
    assert merged._cached_continuous_batching_manager is manager
    merged.destroy_cached_continuous_batching_manager()
    assert not hasattr(merged, "_cached_continuous_batching_manager")


def test_the_weights_are_shared():
    merged = merged_model("llama", "some")
    manager = merged.init_continuous_batching(GenerationConfig(eos_token_id=-1))
    own = {parameter.data_ptr() for parameter in merged.parameters()}
    assert {parameter.data_ptr() for parameter in manager.model.parameters()} == own
