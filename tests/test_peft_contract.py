"""What PEFT's own tests ask of every method, on tiny models: nothing that PEFT offers is left half-working."""

import copy
import math
import pickle
import re

import peft
import pytest
import torch
from conftest import LAYERS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from peft import (
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import HfArgumentParser

from peft_eas import EASConfig

FAMILIES = ["llama", "gpt2", "bert"]
families = pytest.mark.parametrize("family", FAMILIES)
HEADS = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier"}


def config_of(family: str, skip: list[int], **options) -> EASConfig:
    """The config of an adapter that is not the identity, with the MHAs of the layers `skip` skipped."""
    defaults = {
        "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM",
        "skipped_modules": mha_names(family, skip),
        "r": 8,
        "attention_r": 4,
        "context": "running",
        "init_weights": False,
    }
    return EASConfig(**{**defaults, **options})


def with_second(family: str, device: str, skip: list[int], **options) -> PeftModel:
    """A model with the adapter "default", which skips the first and the third MHA, and a "second"."""
    model = make_eas(family, device, [0, 2], "running")
    torch.manual_seed(7)
    model.add_adapter("second", config_of(family, skip, **options))
    return model.eval()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, hence without the running mean, which is a parameter once it is frozen."""
    named = model.named_parameters()
    return {name: value for name, value in named if ".eas_" in name and not name.endswith("running_context")}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@families
def test_saving_one_of_several_with_similar_names(family, safe, device, tmp_path):
    model = make_eas(family, device, [0, 2], "running")
    expected = get_peft_model_state_dict(model)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, config_of(family, [1], r=4))
    model.save_pretrained(tmp_path, selected_adapters=["default"], safe_serialization=safe)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set()
    assert (tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")).exists()
    loaded = PeftModel.from_pretrained(build_model(family, device), tmp_path)
    assert list(loaded.peft_config) == ["default"]
    state = get_peft_model_state_dict(loaded)
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("safe", [True, False])
@families
def test_saving_all_and_loading_them_one_by_one(family, safe, device, tmp_path):
    inputs = make_inputs(family, device)
    model = with_second(family, device, [1])
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(build_model(family, device), tmp_path, torch_device=device)
    for name, options in (("second", {}), ("again", {"low_cpu_mem_usage": True})):
        result = loaded.load_adapter(tmp_path / "second", name, torch_device=device, **options)
        assert result.missing_keys == []
    assert {parameter.device.type for parameter in loaded.parameters()} == {torch.device(device).type}
    for name in ("default", "second", "again"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), inputs), expected[name if name != "again" else "second"])


def test_a_config_that_is_given_for_loading_is_the_one_used(device, tmp_path):
    make_eas("llama", device, [0, 2], "running").save_pretrained(tmp_path)
    config = EASConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_model("llama", device), tmp_path, config=config, is_trainable=False)
    assert model.peft_config["default"] is config
    assert config.inference_mode


# --- one config object for several adapters --------------------------------------------------------------------------


@families
def test_adapters_made_from_one_config_object_are_independent(family, device, tmp_path):
    model = build_model(family, device)
    config = config_of(family, [], skipped_modules=None, num_skip=1, context="prompt")
    model = get_peft_model(model, config)
    model.set_skipped_modules(mha_names(family, [3]))
    model.add_adapter("second", config)
    assert model.peft_config["default"] is config
    assert model.peft_config["second"] is not config
    assert model.peft_config["second"].to_dict()["skipped_modules"] is None
    model.set_adapter("second")
    model.fix_skipped_modules(mha_names(family, [1]))
    with pytest.warns(UserWarning, match="in no training step"):
        model.freeze_context()
    model.set_adapter("default")
    assert (config.context, config.skipped_modules) == ("prompt", None)
    assert model.skipped_modules == mha_names(family, [3])
    model.save_pretrained(tmp_path)
    assert EASConfig.from_pretrained(tmp_path / "second").skipped_modules == mha_names(family, [1])


def test_a_second_adapter_from_the_same_config_whose_weights_do_not_fit_leaves_the_first(device, tmp_path):
    make_eas("llama", device, [0, 2], r=16).save_pretrained(tmp_path)
    config = config_of("llama", [0, 2])
    model = get_peft_model(build_model("llama", device), config)
    model.add_adapter("second", config)
    weights = get_peft_model_state_dict(model, adapter_name="second")
    key = next(key for key in weights if key.endswith("token_down.weight"))
    with pytest.raises(ValueError, match=r"do not fit.*shape"):
        set_peft_model_state_dict(model, {**weights, key: weights[key][:2]}, adapter_name="second")
    assert list(model.peft_config) == ["default"]  # added only for these weights, it is taken out again


# --- setting, deleting -----------------------------------------------------------------------------------------------


@families
def test_deleting_adapters(family, device):
    inputs = make_inputs(family, device)
    base = logits(build_model(family, device), inputs)
    model = with_second(family, device, [1], r=4)
    expected = logits(model, inputs)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted. Setting active adapter to default"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, inputs), expected)
    model.add_adapter("third", config_of(family, [3]))
    model.delete_adapter("third")
    assert (model.active_adapters, list(model.peft_config)) == (["default"], ["default"])
    assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    assert not any(".second." in key or ".third." in key for key in model.state_dict())
    model.delete_adapter("default")
    assert (model.active_adapters, list(model.peft_config)) == ([], [])
    assert adapter_parameters(model) == {}
    assert torch.equal(logits(model.base_model, inputs), base)


@families
def test_a_merged_adapter_is_not_deleted(family, device):
    inputs = make_inputs(family, device)
    model = with_second(family, device, [1])
    model.merge_adapter()
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=r"'default'.*while they are merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default", "second"]
    assert torch.equal(logits(model, inputs), expected)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), expected)


def test_setting_an_adapter_that_is_not_there(device):
    model = with_second("llama", device, [1])
    with pytest.raises(ValueError, match="Adapter nobody not found"):
        model.set_adapter("nobody")
    assert model.active_adapters == ["default"]


def test_a_name_that_is_taken(device):
    model = with_second("llama", device, [1])
    taken = model.peft_config["second"]
    with pytest.raises(ValueError, match="second"):
        model.add_adapter("second", config_of("llama", [2]))
    assert model.peft_config["second"] is taken


@families
def test_set_requires_grad(family, device):
    model = with_second(family, device, [1])
    of = {
        name: [p for key, p in adapter_parameters(model).items() if f".{name}." in key] for name in model.peft_config
    }
    assert all(p.requires_grad for p in of["default"])
    assert not any(p.requires_grad for p in of["second"])
    model.set_requires_grad("second")
    model.set_requires_grad(adapter_names="default", requires_grad=False)
    assert not any(p.requires_grad for p in of["default"])
    assert all(p.requires_grad for p in of["second"])
    model.set_requires_grad(["default", "second"], requires_grad=True)
    assert all(p.requires_grad for p in of["default"] + of["second"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # PEFT finds every merge beside modules_to_save irregular
def test_the_status_of_several(family, device):
    model = with_second(family, device, [1])
    status = model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (["default"], ["default", "second"])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.peft_types == {"default": "EAS", "second": "EAS"}
    layers = model.get_layer_status()
    assert {name for layer in layers for name in layer.available_adapters} == {"default", "second"}
    assert all(layer.active_adapters == ["default"] and layer.enabled for layer in layers)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


@families
def test_counting_parameters(family, device, capsys):
    model = with_second(family, device, [1])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    head = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save.default" in n)
    assert trained == head + sum(p.numel() for n, p in adapter_parameters(model).items() if ".default." in n)
    assert model.get_nb_trainable_parameters() == (trained, everything)
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} || all params: {everything:,}" in capsys.readouterr().out


# --- off -------------------------------------------------------------------------------------------------------------


@families
def test_disabling_within_disabling(family, device):
    inputs = make_inputs(family, device)
    base = logits(build_model(family, device), inputs)
    model = make_eas(family, device, [0, 2], "running")
    expected = logits(model, inputs)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), expected)


def test_unloading_takes_out_what_modules_to_save_trained(device):
    inputs = make_inputs("bert", device)
    base = logits(build_model("bert", device), inputs)
    model = make_eas("bert", device, [0, 2])
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    assert torch.equal(logits(model.unload(), inputs), base)


# --- merging ---------------------------------------------------------------------------------------------------------


@families
def test_merging_several_adds_them_up(family, device):
    """Of two adapters that skip the same MHAs: W (z + what one adds + what the other adds), for every projection."""
    model = with_second(family, device, [0, 2], r=4)
    weights = {name: p.clone() for name, p in build_model(family, device).named_parameters()}
    changes = []
    for name in ("default", "second"):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        changes.append({key: p.detach() for key, p in merged.named_parameters()})
    merged = model.merge_and_unload(adapter_names=["second", "default"])
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    moved = 0
    for key, parameter in merged.named_parameters():
        before = weights.get(key, torch.zeros_like(parameter))
        expected = changes[0][key] + changes[1][key] - before
        if key.startswith(HEADS[family]):
            continue
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-5)
        moved += not torch.equal(changes[0][key], changes[1][key])
    assert moved > LAYERS


@families
def test_a_merge_of_several_is_saved_and_loaded(family, device, tmp_path):
    inputs = make_inputs(family, device)
    merged = with_second(family, device, [0, 2], r=4).merge_and_unload(adapter_names=["default", "second"])
    expected = logits(merged, inputs)
    assert merged.config.eas["origin"]["r"] == 12
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).to(device).eval()
    assert difference(logits(loaded, inputs), expected) <= 1e-5


@pytest.mark.parametrize("skip", [[1], [0], [0, 2, 3]])
def test_several_that_skip_other_mhas_are_not_merged(skip, device):
    inputs = make_inputs("llama", device)
    model = with_second("llama", device, skip)
    expected = logits(model, inputs)
    for names in (["default", "second"], ["second", "second"]):
        with pytest.raises(ValueError, match="several that skip the same MHAs"):
            model.merge_and_unload(adapter_names=names)
    assert torch.equal(logits(model, inputs), expected)


def test_several_are_not_merged_with_each_prompts_context(device):
    model = with_second("llama", device, [0, 2])
    with pytest.raises(ValueError, match=r"one can stay.*adapter_names=\['default', 'second'\]"):
        model.merge_and_unload(adapter_names=["default", "second"], context="prompt")


def test_merging_several_where_one_is_merged_in_place(device):
    model = with_second("llama", device, [0, 2])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default'.*unmerge_adapter\(\)"):
        model.merge_and_unload(adapter_names=["default", "second"])
    with pytest.raises(ValueError, match="folds the active adapter"):
        model.merge_adapter(adapter_names=["default", "second"])


def test_the_head_that_stays_is_the_merged_adapters(device):
    """Not the active adapter's, as PEFT would leave it."""
    model = with_second("bert", device, [1])
    head = model.get_base_model().classifier
    with torch.no_grad():
        head.modules_to_save["second"].weight.mul_(2.0)
    model.set_adapter("second")
    expected = logits(model, make_inputs("bert", device))
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert not isinstance(merged.classifier, ModulesToSaveWrapper)
    assert difference(logits(merged, make_inputs("bert", device)), expected) <= 1e-5


def test_merging_an_adapter_without_the_module_that_another_trains(device):
    model = add_eas(build_model("llama", device), "llama", [0, 2], "running", modules_to_save=["lm_head"])
    model.add_adapter("second", config_of("llama", [1]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2.0)
    model.eval().set_adapter("second")
    expected = logits(model, make_inputs("llama", device))
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert difference(logits(merged, make_inputs("llama", device)), expected) <= 1e-5


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@families
def test_a_nan_is_reported_in_pefts_words(family, method, device):
    model = make_eas(family, device, [0, 2], "running")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter[0] = math.nan
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(model, method)(safe_merge=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@families
def test_merging_in_half_precision(family, dtype, device):
    model = build_model(family, device).to(dtype)
    model = get_peft_model(model, config_of(family, [0, 2])).to(dtype).eval()
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert torch.isfinite(logits(merged, make_inputs(family, device))).all()


class Around(nn.Module):
    """A module of the user's own around a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=tokens).logits


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_a_module_around_the_model(context, device):
    """It runs as the model itself does, and what cannot be merged is left as it is."""
    tokens = make_inputs("llama", device)["input_ids"]
    names = [f"inner.{name}" for name in mha_names("llama", [0, 2])]
    torch.manual_seed(1)
    plain = get_peft_model(build_model("llama", device), config_of("llama", [0, 2], context=context)).eval()
    torch.manual_seed(1)
    config = config_of("llama", [], task_type=None, skipped_modules=names, context=context)
    model = get_peft_model(Around(build_model("llama", device)), config).eval()
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert torch.equal(model(tokens), expected)
        with pytest.raises(TypeError, match=r"this base is a Around.*merge_adapter\(\)"):
            model.merge_and_unload()
        assert torch.equal(model(tokens), expected)
        if context == "running":
            model.merge_adapter()
            assert difference(model(tokens), expected) <= 1e-5


class Blocks(Around):
    """One whose blocks are in no transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(nn.ModuleList(model.model.layers))


def test_a_module_that_cannot_hand_on_the_prompt(device):
    blocks = Blocks(build_model("llama", device))
    with pytest.raises(ValueError, match=r"Blocks.forward\(\) takes no \*\*kwargs.*context='running'"):
        get_peft_model(blocks, EASConfig())
    assert not any(isinstance(module, BaseTunerLayer) for module in blocks.modules())
    get_peft_model(blocks, EASConfig(context="running"))


# --- training --------------------------------------------------------------------------------------------------------


@families
def test_preparing_for_training(family, device):
    inputs = make_inputs(family, device)
    model = get_peft_model(build_model(family, device), config_of(family, [1]))
    assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad
    base = prepare_model_for_kbit_training(build_model(family, device))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, config_of(family, [1]))
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad


@pytest.mark.parametrize("init_weights", [True, False])
@families
def test_gradients_reach_the_adapters_and_nothing_else(family, init_weights, device):
    for skip in ([], [1], [0, 1, 2, 3]):
        model = get_peft_model(build_model(family, device), config_of(family, skip, init_weights=init_weights))
        model.train()
        model(**make_inputs(family, device)).logits.sum().backward()
        for name, parameter in model.named_parameters():
            trained = ".eas_" in name or ".modules_to_save." in name
            trained &= not name.endswith("running_context")
            assert parameter.requires_grad == trained
            assert (parameter.grad is not None) == trained, name


@families
def test_an_adapter_trained_in_bfloat16(family, device, tmp_path):
    """The base and its adapter both; saved and loaded, it gives the same outputs."""
    inputs = make_inputs(family, device)
    base = build_model(family, device).to(torch.bfloat16)
    config = config_of(family, [0, 2], dropout=0.0, init_weights=True)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).train()
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.bfloat16}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).logits.float().square().mean().backward()
        optimizer.step()
    after = adapter_parameters(model)
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    assert any(not torch.equal(after[name], start[name]) for name in after)
    expected = logits(model.eval(), inputs)
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast).eval()
        assert {parameter.dtype for parameter in adapter_parameters(loaded).values()} == {dtype}
        if autocast:
            assert difference(logits(loaded, inputs), expected) <= 0.05
        else:
            assert torch.equal(logits(loaded, inputs), expected)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 does not compile a stock BERT either")
def test_a_compiled_model(device):
    inputs = make_inputs("bert", device)
    model = get_peft_model(build_model("bert", device, num_hidden_layers=1), config_of("bert", [0])).eval()
    model.add_adapter("second", config_of("bert", []))
    model.eval()  # PEFT adds adapters in training mode, with dropout
    compiled = torch.compile(model, backend="eager")
    expected = logits(model, inputs)
    assert difference(logits(compiled, inputs), expected) <= 1e-5
    with model.disable_adapter():
        assert difference(logits(compiled, inputs), logits(model, inputs)) <= 1e-5
    model.set_adapter("second")
    assert difference(logits(compiled, inputs), logits(model, inputs)) <= 1e-5
    assert difference(logits(compiled, inputs), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_that_come_later_keep_the_dtype(dtype, device, tmp_path):
    model = get_peft_model(
        build_model("llama", device).to(dtype), config_of("llama", [1]), autocast_adapter_dtype=False
    )
    model.add_adapter("added", config_of("llama", [2]), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "added", "loaded", autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {dtype}
    model.add_adapter("wide", config_of("llama", [2]))
    wide = {parameter.dtype for name, parameter in adapter_parameters(model).items() if ".wide." in name}
    assert wide == {torch.float32}


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generating_by_keyword_and_by_position(family, dtype, context, device):
    model = get_peft_model(build_model(family, device).to(dtype), config_of(family, [0, 2], context=context)).eval()
    inputs = make_inputs(family, device)
    options = {"max_new_tokens": 3, "do_sample": False}
    by_keyword = model.generate(**inputs, **options)
    assert by_keyword.shape == (2, 15)
    assert torch.equal(model.generate(inputs["input_ids"], **options), by_keyword)
    assert torch.equal(model.base_model.generate(inputs["input_ids"], **options), by_keyword)


@pytest.mark.parametrize("context", ["prompt", "running"])
@families
def test_embeddings_as_input(family, context, device):
    model = get_peft_model(build_model(family, device), config_of(family, [0, 2], context=context)).eval()
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(logits(model, {**inputs, "inputs_embeds": embeddings}), expected)


# --- state dicts -----------------------------------------------------------------------------------------------------


@families
def test_the_base_models_state_dict(family, device):
    base = build_model(family, device)
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config_of(family, [0, 2]))
    state = get_base_model_state_dict(model)
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(1.0)
    result = set_base_model_state_dict(model, expected, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    state = get_base_model_state_dict(model)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@families
def test_injecting_on_meta_and_loading(family, device):
    inputs = make_inputs(family, device)
    torch.manual_seed(0)
    model = inject_adapter_in_model(config_of(family, [0, 2], task_type=None), build_model(family, device)).eval()
    weights = get_peft_model_state_dict(model)
    empty = inject_adapter_in_model(
        config_of(family, [0, 2], task_type=None), build_model(family, device), low_cpu_mem_usage=True
    )
    assert "meta" in {parameter.device.type for parameter in empty.parameters()}
    result = set_peft_model_state_dict(empty, weights, low_cpu_mem_usage=True)
    assert result.unexpected_keys == []
    assert torch.equal(logits(empty.to(device).eval(), inputs), logits(model, inputs))


@families
def test_injecting_by_the_weights_alone_finds_the_targets(family, device, recwarn):
    model = inject_adapter_in_model(config_of(family, [0, 2], task_type=None), build_model(family, device)).eval()
    weights = get_peft_model_state_dict(model)
    recwarn.clear()
    again = inject_adapter_in_model(
        config_of(family, [0, 2], task_type=None), build_model(family, device), state_dict=weights
    )
    assert not [warning for warning in recwarn if "inconsistency" in str(warning.message)]
    assert set_peft_model_state_dict(again, weights).unexpected_keys == []
    inputs = make_inputs(family, device)
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))


def test_mismatched_modules_to_save_are_ignored_on_request(device, tmp_path):
    """A head of another vocabulary stays the base's; EAS weights that do not fit are an error all the same."""
    model = make_eas("llama", device, [0, 2], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    larger = build_model("llama", device, vocab_size=70)
    with pytest.warns(UserWarning, match="lm_head"):
        loaded = PeftModel.from_pretrained(larger, tmp_path, ignore_mismatched_sizes=True)
    own, given = adapter_parameters(loaded), adapter_parameters(model)
    assert all(torch.equal(own[name], given[name]) for name in given)
    weights = get_peft_model_state_dict(model)
    key = next(key for key in weights if key.endswith("token_down.weight"))
    with pytest.raises(ValueError, match=r"do not fit.*is missing"):
        set_peft_model_state_dict(model, {**weights, key: weights[key][:2]}, ignore_mismatched_sizes=True)


@families
def test_pickle(family, device):
    inputs = make_inputs(family, device)
    model = make_eas(family, device, [0, 2])
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(restored, inputs), logits(model, inputs))
    restored.set_skipped_modules(mha_names(family, [0, 2]))
    assert list(restored.peft_config) == ["default"]


@pytest.mark.parametrize("loading", ["get_peft_model", "from_pretrained"])
def test_modules_to_save_of_several_adapters(loading, device, tmp_path):
    inputs = make_inputs("llama", device)
    model = add_eas(build_model("llama", device), "llama", [0], "running", modules_to_save=["lm_head"])
    model.add_adapter("second", config_of("llama", [1], modules_to_save=["lm_head"]))
    model.add_adapter("third", config_of("llama", [2]))
    head = model.get_base_model().lm_head
    with torch.no_grad():
        for factor, name in ((2.0, "default"), (3.0, "second")):
            head.modules_to_save[name].weight.mul_(factor)
    model.eval()
    expected = {}
    for name in list(model.peft_config):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    if loading == "from_pretrained":
        model.set_adapter("default")
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(build_model("llama", device), tmp_path)
        for name in ("second", "third"):
            model.load_adapter(tmp_path / name, name)
        model.eval()
    for name, output in expected.items():
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), output)


# --- what EAS does not have is refused, and nothing changes ----------------------------------------------------------


def test_what_is_refused(device, tmp_path):
    inputs = make_inputs("llama", device)
    model = with_second("llama", device, [1])
    model.save_pretrained(tmp_path)
    expected = logits(model, inputs)
    calls = {
        "Hotswapping only supports LORA": lambda: hotswap_adapter(model, tmp_path, "default"),
        "do not support LoRA conversion": lambda: peft.convert_to_lora(model, rank=4),
        r"adapter_names=\['default', 'second'\].*set_adapter": lambda: model.generate(
            **inputs, adapter_names=["default", "second"]
        ),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both"),
        "not compatible with the `PeftMixedModel`": lambda: get_peft_model(
            build_model("llama", device), config_of("llama", [1]), mixed=True
        ),
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, TypeError, AttributeError), match=message):
            call()
        assert list(model.peft_config) == ["default", "second"]
        assert torch.equal(logits(model, inputs), expected)
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize(
    "option",
    ["layers_to_transform", "layers_pattern", "rank_pattern", "target_parameters", "bias"],
)
def test_options_of_other_methods(option):
    with pytest.raises(TypeError, match=option):
        EASConfig(**{option: None})


# --- the config ------------------------------------------------------------------------------------------------------

FULL = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/model",
    "revision": "main",
    "inference_mode": True,
    "target_modules": ["b", "a"],
    "exclude_modules": ["c"],
    "kept_modules": ["d"],
    "modules_to_save": ["head", "score"],
    "num_skip": 2,
    "skipped_modules": ["x.a", "x.b"],
    "r": 16,
    "attention_r": 4,
    "groups": 4,
    "paths": 3,
    "scale": 0.5,
    "router_temperature": 3.0,
    "dropout": 0.0,
    "context": "running",
    "init_weights": False,
    "base_shape": {"num_mhas": 2, "widths": [8]},
    "scores": {"x.a": 1.5},
    "trainable_token_indices": {"embed": [3, 4]},
}


@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_a_config_comes_back_as_it_was(values, tmp_path):
    config = EASConfig(**values)
    config.save_pretrained(tmp_path)
    for loaded in (
        EASConfig.from_pretrained(tmp_path),
        PeftConfig.from_pretrained(tmp_path),
        EASConfig(**EASConfig.from_json_file(tmp_path / "adapter_config.json")),
        PeftConfig.from_peft_type(**config.to_dict()),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(loaded) is EASConfig
        assert loaded.to_dict() == config.to_dict()
        assert all(loaded.to_dict()[name] == (sorted(v) if "target" in name else v) for name, v in values.items())


def test_a_config_from_the_command_line():
    line = (
        "--task_type CAUSAL_LM --base_model_name_or_path org/model --revision main --inference_mode "
        r"--target_modules .*self_attn --exclude_modules .*\.0\.self_attn --modules_to_save head score --num_skip 2 "
        "--kept_modules d --skipped_modules x.a x.b --r 16 --attention_r 4 --groups 4 --paths 3 --scale 0.5 "
        "--router_temperature 3 --dropout 0 --context running --no_init_weights"
    )
    words = line.split()
    words += ["--base_shape", '{"num_mhas": 2, "widths": [8]}', "--scores", '{"x.a": 1.5}']
    words += ["--trainable_token_indices", '{"embed": [3, 4]}']
    parser = HfArgumentParser(EASConfig)
    assert "--router_temperature" in parser.format_help()
    [config] = parser.parse_args_into_dataclasses(words)
    expected = {**FULL, "target_modules": ".*self_attn", "exclude_modules": r".*\.0\.self_attn", "kept_modules": "d"}
    assert {name: config.to_dict()[name] for name in FULL} == expected
    [default] = parser.parse_args_into_dataclasses([])
    assert default.to_dict() == EASConfig().to_dict()
    [parsed] = parser.parse_dict(EASConfig(**FULL).to_dict())
    assert parsed.to_dict() == EASConfig(**FULL).to_dict()


@pytest.mark.parametrize("name", ["base_shape", "scores"])
@pytest.mark.parametrize("value", ["{", "[1]", "word", 3])
def test_dicts_that_are_none(name, value):
    with pytest.raises(ValueError, match=rf"EASConfig\({name}=.*must be a dict.*or None"):
        EASConfig(**{name: value})
