"""The adapters of low rank, beside a skipped MHA's FFN and in front of a kept one's: what they add, where they stand,
and their fold; test_architectures.py has them in all families."""

import json

import families
import pytest
import torch
from conftest import build_model, difference, make_inputs
from families import ARCHITECTURES
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn

from peft_eas import EASConfig, EASSearch, eas_summary
from peft_eas.layers import KeptFFNLayer, LowRankAdapter, OutputLayer
from peft_eas.layers.low_rank import LowRankLayer

SKIP = ["model.layers.1.self_attn", "model.layers.3.self_attn"]
KEPT = ["model.layers.0.self_attn", "model.layers.2.self_attn"]
# By the option that gives their rank: the wrapper, and the MHAs that have a use for it.
KINDS = {"output_r": (OutputLayer, SKIP), "ffn_r": (KeptFFNLayer, KEPT)}
both = pytest.mark.parametrize("rank", KINDS)


def llama(**options) -> PeftModel:
    defaults = {"skipped_modules": SKIP, "r": 8, "attention_r": 4, "output_r": 4, "dropout": 0.0}
    torch.manual_seed(1)
    return get_peft_model(build_model("llama"), EASConfig(**{**defaults, **options})).eval()


def layers_of(model: nn.Module, kind: type[LowRankLayer] = LowRankLayer) -> list[LowRankLayer]:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_the_formula():
    adapter = LowRankAdapter(d_in=3, d=2, r=1, scale=2.0)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        adapter.up.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, 0.25]))
    # A h = 1 + 4 + 0 = 5; 2 · (5, −5) + 2 · (0.5, 0.25)
    torch.testing.assert_close(adapter(torch.tensor([1.0, 2.0, 0.0])), torch.tensor([11.0, -9.5]))


def test_dropout_acts_in_training_alone():
    adapter = LowRankAdapter(8, 4, 4, dropout=0.5, init_weights=False)
    h = torch.randn(16, 8)
    torch.manual_seed(0)
    assert not torch.equal(adapter(h), adapter(h))
    assert torch.equal(adapter.eval()(h), adapter(h))


@both
def test_begins_as_nothing_and_learns(rank):
    inputs = make_inputs("llama", "cpu")
    with_it, without = llama(**{rank: 4}), llama(**{rank: 0})
    assert torch.equal(with_it(**inputs).logits, without(**inputs).logits)
    with_it.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    adapters = [adapter for layer in layers_of(with_it, KINDS[rank][0]) for adapter in layer.adapters.values()]
    ups = [parameter for adapter in adapters for parameter in adapter.up.parameters()]
    assert len(ups) == 4
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in ups)


@both
def test_it_acts_where_it_has_a_use_alone(rank):
    kind, mhas = KINDS[rank]
    model = llama(skipped_modules=None, num_skip=2, init_weights=False, **{rank: 4})
    called = []
    for layer in layers_of(model, kind):
        layer.adapters["default"].register_forward_hook(lambda *_, name=layer.candidate.name: called.append(name))
    model.base_model.set_skipped_modules(SKIP)
    model(**make_inputs("llama", "cpu"))
    assert called == mhas
    with model.disable_adapter():
        model(**make_inputs("llama", "cpu"))
    assert called == mhas


@both
def test_the_file_holds_those_of_use_and_loads(rank, tmp_path):
    kind, mhas = KINDS[rank]
    inputs = make_inputs("llama", "cpu")
    model = llama(skipped_modules=None, num_skip=2, init_weights=False, context="running", **{rank: 4})
    model.base_model.fix_skipped_modules(SKIP)
    keys = [key for key in get_peft_model_state_dict(model) if f".{kind.adapter_layer_names[0]}." in key]
    assert len(keys) == 3 * len(mhas)
    assert all(any(mha.replace("self_attn", "mlp.") in key for mha in mhas) for key in keys)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert getattr(loaded.peft_config["default"], rank) == 4


def test_several_output_adapters_are_added_up():
    inputs = make_inputs("llama", "cpu")
    options = {"context": "none", "attention_r": 0, "init_weights": False}
    model = llama(**options)
    torch.manual_seed(2)
    model.add_adapter("second", EASConfig(skipped_modules=SKIP, r=8, output_r=2, **options))
    torch.manual_seed(3)
    model.add_adapter("third", EASConfig(skipped_modules=SKIP, r=8, output_r=0, **options))
    block = model.eval().base_model.model.model.layers[1]
    layer = block.mlp.base_layer.down_proj
    h = torch.randn(5, layer.base_layer.in_features)
    expected = layer.base_layer(h) + layer.eas_output["default"](h) + layer.eas_output["second"](h)
    merged = model.merge_and_unload(adapter_names=["default", "second", "third"])
    torch.testing.assert_close(merged.model.layers[1].mlp.down_proj(h), expected, rtol=1e-4, atol=1e-5)
    assert merged(**inputs).logits.isfinite().all()


def test_merged_in_place_and_taken_out_again():
    inputs = make_inputs("llama", "cpu")
    model, base = llama(init_weights=False, context="running", ffn_r=4), build_model("llama")
    expected = model(**inputs).logits
    model.merge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    used = [layer for layer in layers_of(model) if layer.adapters]
    assert all(projection.bias is not None for layer in used for projection in layer.projections.values())
    model.unmerge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert difference(unloaded(**inputs).logits, base(**inputs).logits) <= 1e-5
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_safe_merge_finds_a_nan_with_each_context():
    for context, merge_context in (("running", None), ("prompt", "prompt")):
        model = llama(context=context)
        layer = model.base_model.model.model.layers[1].mlp.base_layer.down_proj
        layer.eas_output["default"].up.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"NaN or infinity into model\.layers\.1\.mlp\.down_proj\. Nothing was"):
            model.merge_and_unload(safe_merge=True, context=merge_context)
        assert isinstance(layer, OutputLayer)
        assert not layer.merged


@pytest.mark.parametrize("ffn_r", [0, 4])
def test_a_merge_that_keeps_the_prompts_context_folds_them(ffn_r, tmp_path):
    inputs = make_inputs("llama", "cpu")
    model = llama(init_weights=False, ffn_r=ffn_r)
    expected = model(**inputs).logits
    merged = model.merge_and_unload(context="prompt")
    assert difference(merged(**inputs).logits, expected) <= 1e-5
    biases = {f"layers.{i}.mlp.down_proj" for i in (1, 3)}
    if ffn_r:
        biases |= {f"layers.{i}.mlp.{name}_proj" for i in (0, 2) for name in ("gate", "up")}
    assert {name for name in merged.config.eas["biases"] if "mlp" in name} == biases
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)


def test_the_summary_counts_output_adapters_and_their_biases():
    without, with_it = (eas_summary(llama(output_r=rank)) for rank in (0, 4))
    layer = llama().base_model.model.model.layers[1].mlp.base_layer.down_proj
    size = sum(p.numel() for p in layer.eas_output.parameters())
    d = layer.base_layer.out_features
    for name in SKIP:
        before, after = (next(row for row in one.rows if row.name == name) for one in (without, with_it))
        assert after.adapter_parameters - before.adapter_parameters == size
        assert before.saved_parameters - after.saved_parameters == d
    assert with_it.base_parameters == without.base_parameters
    merged = eas_summary(llama(context="running").merge_and_unload())
    assert [row.saved_parameters for row in merged.rows] == [
        row.saved_parameters if row.is_skipped else merged.rows[i].saved_parameters
        for i, row in enumerate(with_it.rows)
    ]


def test_a_mixture_of_experts_takes_no_output_adapter():
    base = ARCHITECTURES["mixtral"].build()
    names = [module for module, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"output_r=4 asks for adapters .* names none in this model; a mixture of"):
        get_peft_model(base, EASConfig(num_skip=1, output_r=4))
    assert [module for module, _ in base.named_modules()] == names
    model = get_peft_model(base, EASConfig(num_skip=1))
    assert model.peft_config["default"].output_r == 0
    assert not any(isinstance(module, OutputLayer) for module in model.modules())


def test_where_some_blocks_are_mixtures_the_others_get_one():
    model = get_peft_model(ARCHITECTURES["deepseek_v3"].build(), EASConfig(num_skip=1, output_r=4))
    layers = [module for module in model.modules() if isinstance(module, OutputLayer)]
    assert [layer.candidate.name for layer in layers] == ["model.layers.0.self_attn"]


def test_the_rank_is_that_of_pia_by_default(tmp_path):
    model = llama(output_r=None)
    assert model.peft_config["default"].output_r == 8
    ranks = [len(p) for name, p in model.named_parameters() if name.endswith("eas_output.default.down")]
    assert ranks == [8, 8]
    model.save_pretrained(tmp_path)
    assert EASConfig.from_pretrained(tmp_path).output_r == 8


@both
def test_an_adapter_of_an_earlier_version_has_none(rank, tmp_path):
    model = llama(init_weights=False, context="running", **{rank: 0})
    inputs = make_inputs("llama", "cpu")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config[rank]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert not layers_of(loaded, KINDS[rank][0])


def test_a_row_without_its_place_takes_none(monkeypatch):
    from dataclasses import replace

    from peft_eas import ARCHITECTURES as TABLE

    monkeypatch.setitem(TABLE, "LlamaDecoderLayer", replace(TABLE["LlamaDecoderLayer"], output_projection=None))
    with pytest.raises(ValueError, match="name output_projection in the row"):
        llama()
    assert not any(isinstance(module, OutputLayer) for module in llama(output_r=None).modules())
    monkeypatch.setitem(TABLE, "LlamaDecoderLayer", replace(TABLE["LlamaDecoderLayer"], output_projection="mlp.down"))
    with pytest.raises(ValueError, match=r"names 'mlp\.down' as the projection .* no such module\. Set output_proj"):
        llama()
    llama(output_r=0)  # a row that was made from another's, whose FFN is its own


@pytest.mark.parametrize("value", [-1, 1.5, "4", True])
def test_bad_ranks(value):
    with pytest.raises(ValueError, match=r"EASConfig\(output_r=.*: output_r must be an integer of at least 0"):
        EASConfig(num_skip=1, output_r=value)


def test_weights_of_another_rank_are_refused(tmp_path):
    llama(init_weights=False, context="running").save_pretrained(tmp_path)
    other = llama(output_r=2)
    with pytest.raises(ValueError, match=r"eas_output\.default\.down has shape \(4, \d+\) instead of \(2, \d+\)"):
        set_peft_model_state_dict(other, load_peft_weights(str(tmp_path)))


def test_the_wrapped_projection_is_a_child_of_the_ffn_for_who_looks_for_linear_layers():
    model = llama()
    assert isinstance(model.base_model.model.model.layers[1].mlp.down_proj.base_layer, nn.Linear)
    assert families.output_r(ARCHITECTURES["llama"]) == 4


# --- in front of a kept MHA's FFN ------------------------------------------------------------------------------------


def test_there_is_none_by_default():
    assert EASConfig().ffn_r == 0
    assert not layers_of(get_peft_model(build_model("llama"), EASConfig(num_skip=2)), KeptFFNLayer)


def test_what_it_adds():
    model = llama(init_weights=False, scale=2.0, ffn_r=4)
    block = model.base_model.model.model.layers[0]
    layer = block.mlp.base_layer
    adapter = layer.eas_ffn["default"]
    z = torch.randn(2, 5, adapter.down.shape[1])
    read = z + 2.0 * (z @ adapter.down.T @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(block.mlp(z), layer.base_layer(read))


@pytest.mark.parametrize(("first", "second"), [(0, 4), (4, 0)])
def test_one_model_has_them_in_all_its_adapters_or_in_none(first, second):
    model, inputs = llama(ffn_r=first, init_weights=False, context="running"), make_inputs("llama", "cpu")
    expected, names = model(**inputs).logits, [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=f"ffn_r={second} was received, but the model has been given an EAS adapter"):
        model.add_adapter("second", EASConfig(skipped_modules=SKIP, ffn_r=second))
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(**inputs).logits, expected)


def test_weights_without_them_are_refused():
    state = get_peft_model_state_dict(llama(init_weights=False, skipped_modules=None, num_skip=2, ffn_r=4))
    other = llama(init_weights=False, skipped_modules=None, num_skip=2, ffn_r=4)
    with pytest.raises(ValueError, match=r"eas_ffn\.default\.\S+ is missing.* EASConfig\(output_r=0, ffn_r=0\)"):
        set_peft_model_state_dict(other, {key: value for key, value in state.items() if ".eas_ffn." not in key})


def test_an_mha_that_is_never_skipped_may_have_it_alone():
    model = llama(skipped_modules=None, num_skip=1, attention_r=0, ffn_r=4, kept_modules=KEPT[:1])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".layers.0." in name]
    assert len(names) == 3
    assert all(".eas_ffn." in name for name in names)
    with pytest.raises(ValueError, match="at least 1 with kept_modules, unless ffn_r is"):
        EASConfig(num_skip=1, attention_r=0, kept_modules=KEPT[:1])


def test_several_are_added_up():
    model = llama(context="none", attention_r=0, init_weights=False, ffn_r=4)
    torch.manual_seed(2)
    options = {"context": "none", "attention_r": 0, "init_weights": False, "r": 8, "output_r": 4}
    model.add_adapter("second", EASConfig(skipped_modules=SKIP, ffn_r=2, **options))
    layer = model.eval().base_model.model.model.layers[0].mlp.base_layer
    z = torch.randn(5, layer.eas_ffn["default"].down.shape[1])
    expected = layer.base_layer(z + layer.eas_ffn["default"](z) + layer.eas_ffn["second"](z))
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(merged.model.layers[0].mlp(z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_the_other_attention_in_front_of_an_ffn_may_be_skipped(context):
    """Of two attentions in front of one FFN, the PIA of one stands in front of the other's adapter."""
    family = ARCHITECTURES["t5"]
    names = [name for name in families.candidates(family, False) if name.startswith("decoder.block.1.")]
    torch.manual_seed(1)
    config = EASConfig(
        skipped_modules=names[:1], r=8, attention_r=4, ffn_r=4, dropout=0.0, init_weights=False, context=context
    )
    model, inputs = get_peft_model(family.build(), config).eval(), family.make_inputs(seed=1)
    nested = [layer for layer in layers_of(model, KeptFFNLayer) if layer.candidate.name in names]
    assert [isinstance(layer.base_layer, KeptFFNLayer) for layer in nested] == [True, False]
    assert [bool(layer.eas_ffn) for layer in nested] == [True, False]
    expected = model(**inputs).logits
    assert difference(model.merge_and_unload(context=context)(**inputs).logits, expected) <= 1e-5


def test_the_summary_counts_it_and_its_biases():
    without, with_it = (eas_summary(llama(ffn_r=rank)) for rank in (0, 4))
    block = llama(ffn_r=4).base_model.model.model.layers[0]
    size = sum(p.numel() for p in block.mlp.base_layer.eas_ffn.parameters())
    biases = sum(p.out_features for p in (block.mlp.gate_proj, block.mlp.up_proj))
    for name in KEPT:
        before, after = (next(row for row in one.rows if row.name == name) for one in (without, with_it))
        assert after.adapter_parameters - before.adapter_parameters == size
        assert after.added_parameters - before.added_parameters == biases
    model = llama(context="running", ffn_r=4)
    merged = eas_summary(model.merge_and_unload())
    assert [row.added_parameters for row in merged.rows] == [row.added_parameters for row in with_it.rows]
    assert merged.saved_parameters == with_it.saved_parameters


@pytest.mark.parametrize("skipped", [0, 1, None])
def test_the_summary_of_two_attentions_in_front_of_an_ffn_is_that_of_the_merged_model(skipped):
    family = ARCHITECTURES["t5"]
    names = [name for name in families.candidates(family, False) if name.startswith("decoder.block.1.")]
    skip = [] if skipped is None else [names[skipped]]
    model = get_peft_model(
        family.build(), EASConfig(skipped_modules=skip, r=8, attention_r=4, ffn_r=4, context="none")
    )
    before, after = eas_summary(model), eas_summary(model.merge_and_unload())
    for one, other in zip(before.rows, after.rows):
        assert one.added_parameters == other.added_parameters
        assert not one.is_skipped or one.saved_parameters == other.saved_parameters


def test_a_search_trains_it_and_drops_those_of_skipped_mhas():
    model = llama(skipped_modules=None, num_skip=2, ffn_r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = make_inputs("llama", "cpu")
    batch = {**inputs, "labels": inputs["input_ids"]}
    search = EASSearch(model, 20, lambda one: model(**one).loss, [batch], optimizer=optimizer, search_steps=10)
    for _ in range(20):
        search.before_step()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.after_step(loss)
    skipped = model.base_model.skipped_modules
    left = {layer.candidate.name for layer in layers_of(model, KeptFFNLayer) if layer.eas_ffn}
    assert left == set(model.base_model.candidates) - set(skipped)
    assert all(
        bool(layer.eas_ffn["default"].up.weight.any()) for layer in layers_of(model, KeptFFNLayer) if layer.eas_ffn
    )


def test_a_mixture_of_experts_takes_none():
    base = ARCHITECTURES["mixtral"].build()
    names = [module for module, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"ffn_r=4 asks for adapters .* mixtures of experts, which get none"):
        get_peft_model(base, EASConfig(num_skip=1, ffn_r=4))
    assert [module for module, _ in base.named_modules()] == names
    model = get_peft_model(ARCHITECTURES["deepseek_v3"].build(), EASConfig(num_skip=1, ffn_r=4))
    assert [layer.candidate.name for layer in layers_of(model, KeptFFNLayer)] == ["model.layers.0.self_attn"]
    # Beside an adapter that has them elsewhere, one that has no place for them needs none.
    model.add_adapter("second", EASConfig(skipped_modules=[], target_modules=["model.layers.2.self_attn"]))
