"""The output adapter: what it adds, where it stands, and its fold; test_architectures.py has it in all families."""

import json

import families
import pytest
import torch
from conftest import build_model, difference, make_inputs
from families import ARCHITECTURES
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from peft_eas import EASConfig, eas_summary
from peft_eas.layers import LowRankAdapter, OutputLayer

SKIP = ["model.layers.1.self_attn", "model.layers.3.self_attn"]


def llama(**options) -> PeftModel:
    defaults = {"skipped_modules": SKIP, "r": 8, "attention_r": 4, "output_r": 4, "dropout": 0.0}
    torch.manual_seed(1)
    return get_peft_model(build_model("llama"), EASConfig(**{**defaults, **options})).eval()


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


def test_begins_as_nothing_and_learns():
    inputs = make_inputs("llama", "cpu")
    with_it, without = llama(), llama(output_r=0)
    assert torch.equal(with_it(**inputs).logits, without(**inputs).logits)
    with_it.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    ups = [p for name, p in with_it.named_parameters() if ".eas_output." in name and ".up." in name]
    assert len(ups) == 4
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in ups)


def test_it_acts_where_the_mha_is_skipped_alone():
    model = llama(skipped_modules=None, num_skip=2, init_weights=False)
    layers = [module for module in model.modules() if isinstance(module, OutputLayer)]
    called = []
    for layer in layers:
        layer.eas_output["default"].register_forward_hook(lambda *_, name=layer.candidate.name: called.append(name))
    model.base_model.set_skipped_modules(SKIP)
    model(**make_inputs("llama", "cpu"))
    assert called == SKIP


def test_the_file_holds_those_of_skipped_mhas_and_loads(tmp_path):
    inputs = make_inputs("llama", "cpu")
    model = llama(skipped_modules=None, num_skip=2, init_weights=False, context="running")
    model.base_model.fix_skipped_modules(SKIP)
    keys = [key for key in get_peft_model_state_dict(model) if ".eas_output." in key]
    assert len(keys) == 3 * len(SKIP)
    assert all(".layers.1." in key or ".layers.3." in key for key in keys)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.peft_config["default"].output_r == 4


def test_several_adapters_are_added_up():
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
    model = llama(init_weights=False, context="running")
    base = build_model("llama")
    expected = model(**inputs).logits
    model.merge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    assert model.base_model.model.model.layers[1].mlp.base_layer.down_proj.base_layer.bias is not None
    model.unmerge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert difference(unloaded(**inputs).logits, base(**inputs).logits) <= 1e-5
    assert unloaded.model.layers[1].mlp.down_proj.bias is None


def test_safe_merge_finds_a_nan_with_each_context():
    for context, merge_context in (("running", None), ("prompt", "prompt")):
        model = llama(context=context)
        layer = model.base_model.model.model.layers[1].mlp.base_layer.down_proj
        layer.eas_output["default"].up.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"NaN or infinity into model\.layers\.1\.mlp\.down_proj\. Nothing was"):
            model.merge_and_unload(safe_merge=True, context=merge_context)
        assert isinstance(layer, OutputLayer)
        assert not layer.merged


def test_a_merge_that_keeps_the_prompts_context_folds_it(tmp_path):
    inputs = make_inputs("llama", "cpu")
    model = llama(init_weights=False)
    expected = model(**inputs).logits
    merged = model.merge_and_unload(context="prompt")
    assert difference(merged(**inputs).logits, expected) <= 1e-5
    biases = [f"layers.{i}.mlp.down_proj" for i in (1, 3)]
    assert [name for name in merged.config.eas["biases"] if "mlp" in name] == biases
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)


def test_the_summary_counts_it_and_its_biases():
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


def test_a_mixture_of_experts_takes_none():
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


def test_an_adapter_of_an_earlier_version_has_none(tmp_path):
    model = llama(output_r=0, init_weights=False, context="running")
    inputs = make_inputs("llama", "cpu")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["output_r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert not any(isinstance(module, OutputLayer) for module in loaded.modules())


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
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with pytest.raises(ValueError, match=r"eas_output\.default\.down has shape \(4, \d+\) instead of \(2, \d+\)"):
        set_peft_model_state_dict(other, load_peft_weights(str(tmp_path)))


def test_the_wrapped_projection_is_a_child_of_the_ffn_for_who_looks_for_linear_layers():
    model = llama()
    assert isinstance(model.base_model.model.model.layers[1].mlp.down_proj.base_layer, nn.Linear)
    assert families.output_r(ARCHITECTURES["llama"]) == 4
