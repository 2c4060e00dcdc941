"""A skipped MHA adds nothing, keeps nothing, and costs nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SKIPS, build_model, difference, logits, make_eas, make_inputs, mha_names, needs_sound_caches
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from peft_eas import Architecture, EASConfig
from peft_eas.runtime.forward import BranchForward
from peft_eas.runtime.skipped import EmptyLayer, NoUpdate, advance_cache, skipped_output


@pytest.fixture
def x():
    return torch.arange(12.0).reshape(1, 3, 4)


def test_a_sum_with_no_update_is_the_other_summand(x):
    nothing = skipped_output(x)
    assert isinstance(nothing, NoUpdate)
    assert x + nothing is x
    assert nothing + x is x
    assert torch.add(x, nothing) is x
    grown = nothing
    grown += x
    assert grown is x


def test_no_update_stays_what_it_is_through_dropout_and_scaling(x):
    nothing = skipped_output(x)
    assert F.dropout(nothing, 0.5, True) is nothing
    assert nn.Dropout(0.5).train()(nothing) is nothing
    assert 0.3 * nothing * 2 is nothing


@pytest.mark.parametrize(
    "function",
    [
        lambda t, x: t + x[0],  # the result is larger than this summand
        lambda t, x: torch.add(x, t, alpha=2),
        lambda t, x: torch.cat([t, x]),
        lambda t, x: torch.stack((x, t)),
        lambda t, x: t * x,
        lambda t, x: t[:, 0],
        lambda t, x: t.to(torch.float64),
        lambda t, x: t.sum(-1),
        lambda t, x: F.layer_norm(t, (4,), weight=torch.ones(4), bias=torch.arange(4.0)),
        lambda t, x: F.linear(input=t, weight=torch.ones(2, 4)),
        lambda t, x: x.clone().add_(t),
        lambda t, x: torch.where(x > 3, x, t),
    ],
)
def test_for_anything_else_it_is_zeros(function, x):
    expected = function(torch.zeros_like(x), x)
    actual = function(skipped_output(x), x)
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype


def test_it_looks_like_the_zeros_and_can_be_copied(x):
    nothing = copy.deepcopy(skipped_output(x.bfloat16()))
    assert (nothing.shape, nothing.dtype, nothing.device) == (x.shape, torch.bfloat16, x.device)
    assert torch.equal(nothing.zeros(), torch.zeros_like(x, dtype=torch.bfloat16))


def test_under_a_compiler_it_is_zeros(x):
    def block(x):
        return x + skipped_output(x)

    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x)


@needs_sound_caches
def test_the_slot_counts_and_holds_no_byte(x):
    cache = DynamicCache()
    for expected in (3, 6):
        advance_cache(cache, 0, x)
        assert cache.get_seq_length(0) == expected
    slot = cache.layers[0]
    assert isinstance(slot, EmptyLayer)
    assert slot.keys.untyped_storage().nbytes() == slot.values.untyped_storage().nbytes() == 0
    cache.crop(-2)
    assert cache.get_seq_length(0) == 4
    cache.batch_repeat_interleave(3)
    assert slot.keys.shape[0] == 3
    cache.reorder_cache(torch.tensor([0, 0, 2]))
    assert cache.get_seq_length(0) == 4
    cache.reset()
    assert cache.get_seq_length(0) == 0
    advance_cache(cache, 0, x)
    assert cache.get_seq_length(0) == 3


def test_a_slot_with_keys_is_refused(x):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match=r"holds keys of layer 0, whose attention is skipped now.*new cache"):
        advance_cache(cache, 0, x)


def test_a_slot_that_was_made_anew_is_refused(x):
    """From the keys and values of a skipped MHA, which have no size: its length is lost, and positions with it."""
    cache = DynamicCache()
    advance_cache(cache, 0, x)
    again = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(ValueError, match=r"slot of layer 0.*lost its length.*deepcopy"):
        advance_cache(again, 0, x)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "vit"])
def test_merged_blocks_call_nothing_but_their_branch(family, device):
    merged = make_eas(family, device, SKIPS["half"], "running").merge_and_unload()
    blocks = [merged.get_submodule(name.rpartition(".")[0]) for name in mha_names(family)]
    assert [isinstance(block.forward, BranchForward) for block in blocks] == [True, False, True, False]
    called = []
    for name, module in blocks[0].named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    logits(merged, make_inputs(family, device))
    stub = mha_names(family)[0].rpartition(".")[2]
    assert called
    assert not any(name.startswith(stub) for name in called)
    assert not any(isinstance(blocks[0].get_submodule(name), nn.Identity) for name in called if name)


def test_a_block_with_another_part_runs_its_own_code(device):
    """GPT-2 with cross-attention computes more than its FFN branch."""
    base = build_model("gpt2", device, add_cross_attention=True)
    inputs = make_inputs("gpt2", device)
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 32, device=device)
    names = mha_names("gpt2", [0, 2])
    config = EASConfig(r=8, skipped_modules=names, context="running", init_weights=False, attention_r=0)
    model = get_peft_model(base, config).eval()
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert not any(isinstance(block.forward, BranchForward) for block in merged.transformer.h)
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_a_branch_without_the_ffn():
    with pytest.raises(ValueError, match=r"branch=\('norm2',\)\) does not contain ffn='ffn'.*leave branch out"):
        Architecture(
            mha="attn", mha_projections=("attn.qkv",), ffn="ffn", ffn_projections=("ffn.up",), branch=("norm2",)
        )
