"""The adapter in front of a kept MHA's FFN: where it stands, its fold, its file; test_architectures.py has it in all
families."""

import json

import pytest
import torch
from conftest import build_model, difference, make_inputs
from families import ARCHITECTURES
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from peft_eas import EASConfig, EASSearch, eas_summary
from peft_eas.layers import FFNLayer, KeptFFNLayer

SKIP = ["model.layers.1.self_attn", "model.layers.3.self_attn"]
KEPT = ["model.layers.0.self_attn", "model.layers.2.self_attn"]


def llama(**options) -> PeftModel:
    defaults = {"skipped_modules": SKIP, "r": 8, "attention_r": 4, "output_r": 4, "ffn_r": 4, "dropout": 0.0}
    torch.manual_seed(1)
    return get_peft_model(build_model("llama"), EASConfig(**{**defaults, **options})).eval()


def layers_of(model: torch.nn.Module) -> list[KeptFFNLayer]:
    return [module for module in model.modules() if isinstance(module, KeptFFNLayer)]


def test_there_is_none_by_default():
    assert EASConfig().ffn_r == 0
    assert not layers_of(get_peft_model(build_model("llama"), EASConfig(num_skip=2)))


def test_begins_as_nothing_and_learns():
    inputs = make_inputs("llama", "cpu")
    with_it, without = llama(), llama(ffn_r=0)
    assert torch.equal(with_it(**inputs).logits, without(**inputs).logits)
    with_it.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    ups = [p for name, p in with_it.named_parameters() if ".eas_ffn." in name and ".up." in name]
    assert len(ups) == 4
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in ups)


def test_it_acts_where_the_mha_is_kept_alone():
    model = llama(skipped_modules=None, num_skip=2, init_weights=False)
    called = []
    for layer in layers_of(model):
        layer.eas_ffn["default"].register_forward_hook(lambda *_, name=layer.candidate.name: called.append(name))
    model.base_model.set_skipped_modules(SKIP)
    model(**make_inputs("llama", "cpu"))
    assert called == KEPT
    with model.disable_adapter():
        model(**make_inputs("llama", "cpu"))
    assert called == KEPT


def test_what_it_adds():
    model = llama(init_weights=False, scale=2.0)
    block = model.base_model.model.model.layers[0]
    layer = block.mlp.base_layer
    adapter = layer.eas_ffn["default"]
    z = torch.randn(2, 5, adapter.down.shape[1])
    read = z + 2.0 * (z @ adapter.down.T @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(block.mlp(z), layer.base_layer(read))


def test_the_file_holds_those_of_kept_mhas_and_loads(tmp_path):
    inputs = make_inputs("llama", "cpu")
    model = llama(skipped_modules=None, num_skip=2, init_weights=False, context="running")
    model.base_model.fix_skipped_modules(SKIP)
    keys = [key for key in get_peft_model_state_dict(model) if ".eas_ffn." in key]
    assert len(keys) == 3 * len(KEPT)
    assert all(".layers.0." in key or ".layers.2." in key for key in keys)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded.peft_config["default"].ffn_r == 4


@pytest.mark.parametrize(("first", "second"), [(0, 4), (4, 0)])
def test_one_model_has_them_in_all_its_adapters_or_in_none(first, second):
    model, inputs = llama(ffn_r=first, init_weights=False, context="running"), make_inputs("llama", "cpu")
    expected, names = model(**inputs).logits, [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=f"ffn_r={second} was received, but the model has had an EAS adapter with"):
        model.add_adapter("second", EASConfig(skipped_modules=SKIP, ffn_r=second))
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(**inputs).logits, expected)


def test_several_adapters_are_added_up():
    model = llama(context="none", attention_r=0, init_weights=False)
    torch.manual_seed(2)
    options = {"context": "none", "attention_r": 0, "init_weights": False, "r": 8, "output_r": 4}
    model.add_adapter("second", EASConfig(skipped_modules=SKIP, ffn_r=2, **options))
    layer = model.eval().base_model.model.model.layers[0].mlp.base_layer
    z = torch.randn(5, layer.eas_ffn["default"].down.shape[1])
    expected = layer.base_layer(z + layer.eas_ffn["default"](z) + layer.eas_ffn["second"](z))
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(merged.model.layers[0].mlp(z), expected, rtol=1e-4, atol=1e-5)


def test_merged_in_place_and_taken_out_again():
    inputs = make_inputs("llama", "cpu")
    model, base = llama(init_weights=False, context="running"), build_model("llama")
    expected = model(**inputs).logits
    model.merge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    model.unmerge_adapter()
    assert difference(model(**inputs).logits, expected) <= 1e-5
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert difference(unloaded(**inputs).logits, base(**inputs).logits) <= 1e-5
    assert unloaded.model.layers[0].mlp.up_proj.bias is None


def test_a_merge_that_keeps_the_prompts_context_folds_it(tmp_path):
    inputs = make_inputs("llama", "cpu")
    model = llama(init_weights=False)
    expected = model(**inputs).logits
    merged = model.merge_and_unload(context="prompt")
    assert difference(merged(**inputs).logits, expected) <= 1e-5
    biases = [f"layers.{i}.mlp.{name}_proj" for i in (0, 2) for name in ("gate", "up")]
    assert [name for name in merged.config.eas["biases"] if "down" not in name] == biases
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_the_other_attention_in_front_of_an_ffn_may_be_skipped(context):
    """Of two attentions in front of one FFN, the PIA of one stands in front of the other's adapter."""
    family = ARCHITECTURES["t5"]
    names = [name for name in _candidates(family) if name.startswith("decoder.block.1.")]
    torch.manual_seed(1)
    config = EASConfig(
        skipped_modules=names[:1], r=8, attention_r=4, ffn_r=4, dropout=0.0, init_weights=False, context=context
    )
    model, inputs = get_peft_model(family.build(), config).eval(), family.make_inputs(seed=1)
    nested = [layer for layer in layers_of(model) if layer.candidate.name in names]
    assert [isinstance(layer.base_layer, KeptFFNLayer) for layer in nested] == [True, False]
    assert [bool(layer.eas_ffn) for layer in nested] == [True, False]
    expected = model(**inputs).logits
    assert difference(model.merge_and_unload(context=context)(**inputs).logits, expected) <= 1e-5


def _candidates(family) -> list[str]:
    return get_peft_model(family.build(), EASConfig(num_skip=0)).base_model.candidates


def test_the_summary_counts_it_and_its_biases():
    without, with_it = (eas_summary(llama(ffn_r=rank)) for rank in (0, 4))
    block = llama().base_model.model.model.layers[0]
    size = sum(p.numel() for p in block.mlp.base_layer.eas_ffn.parameters())
    biases = sum(p.out_features for p in (block.mlp.gate_proj, block.mlp.up_proj))
    for name in KEPT:
        before, after = (next(row for row in one.rows if row.name == name) for one in (without, with_it))
        assert after.adapter_parameters - before.adapter_parameters == size
        assert after.added_parameters - before.added_parameters == biases
    model = llama(context="running")
    merged = eas_summary(model.merge_and_unload())
    assert [row.added_parameters for row in merged.rows] == [row.added_parameters for row in with_it.rows]
    assert merged.saved_parameters == with_it.saved_parameters


def test_a_search_trains_it_and_drops_those_of_skipped_mhas():
    model = llama(skipped_modules=None, num_skip=2)
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
    left = {layer.candidate.name for layer in layers_of(model) if layer.eas_ffn}
    assert left == set(model.base_model.candidates) - set(skipped)
    assert all(bool(layer.eas_ffn["default"].up.weight.any()) for layer in layers_of(model) if layer.eas_ffn)


def test_a_mixture_of_experts_takes_none():
    base = ARCHITECTURES["mixtral"].build()
    names = [module for module, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"ffn_r=4 asks for adapters .* mixtures of experts, which get none"):
        get_peft_model(base, EASConfig(num_skip=1, ffn_r=4))
    assert [module for module, _ in base.named_modules()] == names
    model = get_peft_model(ARCHITECTURES["deepseek_v3"].build(), EASConfig(num_skip=1, ffn_r=4))
    assert [layer.candidate.name for layer in layers_of(model)] == ["model.layers.0.self_attn"]


def test_an_adapter_of_an_earlier_version_has_none(tmp_path):
    model, inputs = llama(ffn_r=0, init_weights=False, context="running"), make_inputs("llama", "cpu")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["ffn_r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert isinstance(loaded.base_model.model.model.layers[0].mlp, FFNLayer)
    assert not layers_of(loaded)
