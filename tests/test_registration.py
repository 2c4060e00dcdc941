"""Importing the package makes EAS a method of PEFT, for every way in which PEFT and transformers load adapters."""

import copy
import importlib
import json
import pickle

import pytest
import torch
from conftest import (
    DECODERS,
    LAYERS,
    add_eas,
    build_model,
    logits,
    make_eas,
    make_inputs,
    mha_names,
    needs_peft_of_transformers,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from processes import run_alone
from transformers import AutoModelForCausalLM

import peft_eas
from peft_eas import EASConfig, EASModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory, device):
    """For each decoder: folder of a base model, folder of an adapter that skips two MHAs, inputs, and the logits."""
    folders = {}
    for family in DECODERS:
        base, adapter = tmp_path_factory.mktemp(f"{family}-base"), tmp_path_factory.mktemp(f"{family}-adapter")
        build_model(family, device).save_pretrained(base)
        model = add_eas(AutoModelForCausalLM.from_pretrained(base).to(device), family, [0, 2])
        model.save_pretrained(adapter)
        inputs = make_inputs(family, device)
        expected = logits(model, inputs)
        with model.disable_adapter():
            assert (logits(model, inputs) - expected).abs().max() > 0.1
        folders[family] = (base, adapter, inputs, expected)
    return folders


def test_the_enum_has_one_more_member():
    assert PeftType.EAS is PeftType("EAS") is PeftType["EAS"]
    assert PeftType.EAS == "EAS"
    assert "EAS" in list(PeftType)
    assert list(PeftType).count("EAS") == 1
    assert PeftType.EAS in PeftType
    assert isinstance(PeftType.EAS, PeftType)
    assert PeftType.EAS.name == PeftType.EAS.value == "EAS"
    assert json.loads(json.dumps({"peft_type": PeftType.EAS})) == {"peft_type": "EAS"}
    assert hash(PeftType.EAS) == hash(PeftType("EAS"))


def test_the_member_survives_copies():
    assert pickle.loads(pickle.dumps(PeftType.EAS)) is PeftType.EAS
    assert copy.deepcopy(PeftType.EAS) is PeftType.EAS
    config = EASConfig(r=4, groups=1)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_other_members_are_as_before():
    assert PeftType.LORA is PeftType("LORA")
    assert PeftType.LORA != PeftType.EAS
    with pytest.raises(ValueError, match="NOT_A_METHOD"):
        PeftType("NOT_A_METHOD")


def test_importing_again_is_harmless(device):
    importlib.reload(peft_eas)
    importlib.reload(peft_eas.peft_type)
    importlib.reload(peft_eas)
    assert list(PeftType).count("EAS") == 1
    model = get_peft_model(build_model("llama", device), peft_eas.EASConfig(num_skip=1))
    assert isinstance(model.base_model, peft_eas.EASModel)


def test_importing_all_of_it_anew_is_harmless(tmp_path):
    """As notebooks that reload every module do."""
    script = """
import sys, warnings
warnings.simplefilter("error", DeprecationWarning)
import peft_eas
for name in [name for name in sys.modules if name.split(".")[0] == "peft_eas"]:
    del sys.modules[name]
import peft_eas, torch
from peft import PeftType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
assert list(PeftType).count("EAS") == 1
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), peft_eas.EASConfig(r=2, attention_r=2, num_skip=1))
model.set_skipped_modules(model.candidates[:1])
model(input_ids=torch.tensor([[1, 2]]))
"""
    run_alone(script, folder=tmp_path)


def test_get_peft_model_makes_an_eas_model(device):
    model = get_peft_model(build_model("llama", device), EASConfig(task_type="CAUSAL_LM", num_skip=2))
    assert isinstance(model.base_model, EASModel)
    assert model.peft_type == PeftType.EAS
    assert model.candidates == mha_names("llama")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("eas_" in name for name in trainable)


def test_config_round_trip(tmp_path):
    config = EASConfig(
        task_type="CAUSAL_LM", target_modules=["self_attn"], exclude_modules=["layers.0.self_attn"], num_skip=2, r=6,
        attention_r=2, groups=2, scale=0.5, router_temperature=3.0, dropout=0.0, context="running",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is EASConfig
    assert loaded == config
    assert EASConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("family", DECODERS)
def test_peft_model_from_pretrained(family, saved, device):
    base, adapter, inputs, expected = saved[family]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).to(device), adapter)
    assert model.skipped_modules == mha_names(family, [0, 2])
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("family", DECODERS)
def test_low_cpu_mem_usage(family, saved, device):
    base, adapter, inputs, expected = saved[family]
    model = AutoModelForCausalLM.from_pretrained(base).to(device)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("auto_class", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("family", DECODERS)
def test_auto_classes_find_the_base_of_an_adapter(family, auto_class, saved, device):
    _, adapter, inputs, expected = saved[family]
    model = auto_class.from_pretrained(adapter).to(device)
    assert torch.equal(logits(model, inputs), expected)


@needs_peft_of_transformers
@pytest.mark.parametrize("family", DECODERS)
def test_load_adapter_of_transformers(family, saved, device):
    base, adapter, inputs, expected = saved[family]
    model = AutoModelForCausalLM.from_pretrained(base).to(device)
    base_logits = logits(model, inputs)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model, inputs), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), base_logits)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), expected)


@needs_peft_of_transformers
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_load_adapter_of_transformers_with_a_frozen_context(family, device, tmp_path):
    """The running mean is a buffer, which transformers loads by other means than parameters."""
    inputs = make_inputs(family, device)
    model = make_eas(family, device, [0, 2], "running")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = build_model(family, device)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, inputs), expected)


@needs_peft_of_transformers
def test_two_adapters_of_transformers(device, tmp_path):
    inputs = make_inputs("llama", device)
    base = build_model("llama", device)
    base_logits = logits(base, inputs)
    expected = {}
    for name, layers in (("a", [0, 2]), ("b", [3])):
        model = make_eas("llama", device, layers, groups=2 if name == "a" else 1)
        expected[name] = logits(model, inputs)
        model.save_pretrained(tmp_path / name)
        base.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("a", "b", "a"):
        base.set_adapter(name)
        assert torch.equal(logits(base, inputs), expected[name])
    base.disable_adapters()
    assert torch.equal(logits(base, inputs), base_logits)
    base.enable_adapters()
    base.delete_adapter("a")
    base.set_adapter("b")
    assert torch.equal(logits(base, inputs), expected["b"])
    out = base.generate(**inputs, max_new_tokens=5, do_sample=False)
    uncached = base.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(out, uncached)


def test_adapters_on_top_of_adapters(device):
    """A second PeftModel around a model that has EAS adapters adds to them, under another name only."""
    first = make_eas("llama", device, [0, 2])
    inputs = make_inputs("llama", device)
    expected = logits(first, inputs)
    refused = pytest.raises(ValueError, match=r"'default' already.*unload\(\)")
    with pytest.warns(UserWarning, match="second time"), refused:
        get_peft_model(first.base_model.model, EASConfig(num_skip=1))
    assert torch.equal(logits(first, inputs), expected)
    assert first.skipped_modules == mha_names("llama", [0, 2])
    with pytest.warns(UserWarning, match="second time"):
        second = get_peft_model(first.base_model.model, EASConfig(num_skip=1), adapter_name="second").eval()
    second.set_adapter("second")
    assert torch.equal(logits(second, inputs), logits(build_model("llama", device), inputs))
    second.set_skipped_modules(mha_names("llama", [1]))
    assert not torch.equal(logits(second, inputs), logits(build_model("llama", device), inputs))
    second.set_adapter("default")
    assert torch.equal(logits(second, inputs), expected)


def test_generation_with_load_adapter_of_transformers(saved, device):
    """Without a PeftModel around it, the prompt is told from the model's own call."""
    base, adapter, inputs, _ = saved["llama"]
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).to(device), adapter)
    model = AutoModelForCausalLM.from_pretrained(base).to(device)
    model.load_adapter(str(adapter))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@needs_peft_of_transformers
def test_add_adapter_of_transformers(device, tmp_path):
    model = build_model("llama", device)
    inputs = make_inputs("llama", device)
    base_logits = logits(model, inputs)
    torch.manual_seed(1)
    model.add_adapter(
        EASConfig(r=8, attention_r=4, dropout=0.0, init_weights=False, skipped_modules=mha_names("llama", [1])),
        adapter_name="mine",
    )
    expected = logits(model.eval(), inputs)
    assert (expected - base_logits).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = build_model("llama", device)
    again.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize(
    "name", ["mine", "a", "eas", "up", "weight", "token_down", "eas_vqa", "eas_pia", "0", "running_context"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_names(family, name, device, tmp_path):
    """Any name will do, also one that a part of the adapter has."""
    reference = make_eas(family, device, [0, 2])
    inputs = make_inputs(family, device)
    reference.save_pretrained(tmp_path / "reference")
    model = PeftModel.from_pretrained(build_model(family, device), tmp_path / "reference", adapter_name=name).eval()
    expected = logits(reference, inputs)
    assert torch.equal(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build_model(family, device), tmp_path / "again" / name).eval()
    assert torch.equal(logits(again, inputs), expected)


def test_keys_of_the_file_do_not_hold_the_adapter_name(device):
    """One name for a weight, whatever PEFT's version and whatever the adapter is called."""
    model = get_peft_model(
        build_model("llama", device),
        EASConfig(r=4, attention_r=2, skipped_modules=mha_names("llama", [0])),
        adapter_name="mine",
    )
    keys = set(get_peft_model_state_dict(model, adapter_name="mine"))
    assert "base_model.model.model.layers.0.mlp.eas_pia.up.1.weight" in keys
    assert "base_model.model.model.layers.0.mlp.eas_pia.running_context" in keys
    assert "base_model.model.model.layers.1.self_attn.eas_input.token_down.bias" in keys
    assert not any("mine" in key for key in keys)


def test_set_peft_model_state_dict(device):
    source = make_eas("gpt2", device, [1, 2])
    target = get_peft_model(
        build_model("gpt2", device),
        EASConfig(task_type="CAUSAL_LM", r=8, attention_r=4, skipped_modules=mha_names("gpt2", [1, 2])),
    ).eval()
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "eas_" in key]
    inputs = make_inputs("gpt2", device)
    assert torch.equal(logits(target, inputs), logits(source, inputs))


@pytest.mark.parametrize("with_state_dict", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_inject_adapter_in_model(family, with_state_dict, device):
    """PEFT's low-level way, without a PeftModel: the model keeps its class and still has the adapters."""
    source = make_eas(family, device, [0, 2], task_type=None)
    weights = get_peft_model_state_dict(source)
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    config = EASConfig(r=8, attention_r=4, dropout=0.0, skipped_modules=mha_names(family, [0, 2]))
    model = build_model(family, device)
    model = inject_adapter_in_model(config, model, state_dict=weights if with_state_dict else None)
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    inputs = make_inputs(family, device)
    assert torch.equal(logits(model.eval(), inputs), logits(source, inputs))


def test_the_base_may_be_on_meta_while_adapters_are_added():
    with torch.device("meta"):
        model = build_model("llama", "meta")
    model = get_peft_model(model, EASConfig(num_skip=1), low_cpu_mem_usage=True)
    assert len(model.candidates) == LAYERS
    assert all(parameter.is_meta for parameter in model.parameters())
