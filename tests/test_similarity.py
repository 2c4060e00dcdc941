"""Cosine similarities of what stands in front of and behind each attention."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, build_model, make_eas, make_inputs, mha_names
from families import ARCHITECTURES
from peft import get_peft_model
from skippable import Blocks

from peft_eas import EASConfig, attention_similarities


def test_is_the_similarity_of_the_residual_streams_of_a_llama() -> None:
    base, inputs = build_model("llama"), make_inputs("llama", "cpu")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in base.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append((args[0],)))
        # In front of the second norm stands what the attention was added to.
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append((seen.pop()[0], args[0])))
    with torch.no_grad():
        base(**inputs)
    mask = inputs["attention_mask"].bool()
    expected = [F.cosine_similarity(*pair, dim=-1)[mask].mean() for pair in seen]
    model = make_eas("llama", "cpu", skip=[], init_weights=True)
    found = attention_similarities(model, [inputs])
    assert list(found) == mha_names("llama")
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.stack(expected))


def test_of_blocks_with_one_norm_for_mha_and_ffn() -> None:
    family = ARCHITECTURES["falcon"]
    base, inputs = family.build().eval(), family.make_inputs()
    streams, added = [], []
    for layer in base.transformer.h:
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        layer.self_attention.register_forward_hook(lambda _, args, output: added.append(output[0]))
    with torch.no_grad():
        base(**inputs)
    mask = inputs["attention_mask"].bool()
    expected = [F.cosine_similarity(x, x + y, dim=-1)[mask].mean() for x, y in zip(streams, added, strict=True)]
    model = get_peft_model(base, EASConfig(num_skip=1, r=8))
    found = attention_similarities(model, [inputs])
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.stack(expected))


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_an_attention_that_adds_nothing_changes_nothing(family: str) -> None:
    model = make_eas(family, "cpu", skip=[]).train()
    first = next(iter(model.base_model.candidates))
    attention = model.get_base_model().get_submodule(first)
    dense = attention.output.dense if family == "bert" else attention.o_proj
    dense.weight.data.zero_()
    if dense.bias is not None:
        dense.bias.data.zero_()
    if family == "bert":  # a norm of what is normed already changes nothing either
        for norm in (attention.output.LayerNorm, model.get_base_model().bert.embeddings.LayerNorm):
            norm.reset_parameters()
    inputs = make_inputs(family, "cpu")
    similarities = attention_similarities(model, [inputs, inputs])
    assert all(-1.0 <= value <= 1.0 for value in similarities.values())
    assert len(similarities) == LAYERS
    assert model.training
    assert similarities[first] == pytest.approx(1.0, abs=1e-3)
    assert max(similarities, key=similarities.get) == first
    assert not any(module._forward_hooks for module in attention.modules())


def test_padding_does_not_count() -> None:
    model, inputs = make_eas("llama", "cpu", skip=[]), make_inputs("llama", "cpu", batch=1)
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded = {
        "input_ids": F.pad(inputs["input_ids"], (5, 0), value=0),
        "attention_mask": F.pad(inputs["attention_mask"], (5, 0)),
    }
    assert attention_similarities(model, [padded]) == pytest.approx(attention_similarities(model, [inputs]), abs=1e-6)


def test_bad_input() -> None:
    inputs = make_inputs("llama", "cpu")
    with pytest.raises(TypeError, match="without EAS adapters"):
        attention_similarities(build_model("llama"), [inputs])
    with pytest.raises(TypeError, match="of which a Blocks tells nothing"):
        attention_similarities(Blocks(), [inputs])
    with pytest.raises(ValueError, match=r"but 1 are skipped, such as model\.layers\.2\.self_attn"):
        attention_similarities(make_eas("llama", "cpu", skip=[2]), [inputs])
    with pytest.raises(ValueError, match="4 of 4 attentions were not called"):
        attention_similarities(make_eas("llama", "cpu", skip=[]), [])
    hidden = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
    with pytest.raises(ValueError, match="4 of 4 attentions were not called, or with hidden tokens alone"):
        attention_similarities(make_eas("llama", "cpu", skip=[]), [hidden])
    with pytest.raises(TypeError, match=r"a batch of type str\. Pass an iterable of batches"):
        attention_similarities(make_eas("llama", "cpu", skip=[]), inputs)
