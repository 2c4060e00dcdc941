"""What vLLM's backend for transformers' models is shown of merged ones; test_vllm_engine.py runs them there.

What the backend does: it sets the attention of the config that it holds, builds the model from that, twice, and reads
both.
"""

import copy
import re
import types

import pytest
import torch
import transformers
from conftest import LAYERS, build_model, difference, logits, make_eas, make_inputs
from families import ARCHITECTURES, make
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_eas.runtime.merged import merged_config_class
from peft_eas.runtime.skipped import SkippedMHA

# --- what vLLM is shown ----------------------------------------------------------------------------------------------


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """As vLLM's, of one sequence: causal, and without a mask."""
    assert attention_mask is None
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@pytest.fixture(autouse=True)
def vllm_attention():
    """Lets configs name the attentions of vLLM, and SGLang's."""
    for name in ("vllm", "vllm_mla", "sglang"):
        ALL_ATTENTION_FUNCTIONS[name] = _attention
    yield
    for name in ("vllm", "vllm_mla", "sglang"):
        del ALL_ATTENTION_FUNCTIONS[name]


def config_in_vllm(model):
    """The config as vLLM holds it when it builds the model."""
    config = copy.deepcopy(model.config)
    config.get_text_config()._attn_implementation = "vllm"
    return config


def attentions(model):
    """The numbers of the attentions that dispatch to vLLM, in the model's order, by their names."""
    return {
        name: module.layer_idx
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "config", None) is not None
        and module.config._attn_implementation.startswith("vllm")
    }


@pytest.mark.parametrize("skip", [[0], [0, 2], [3], [0, 1, 3]])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_kept_attentions_are_numbered_and_counted(family, skip):
    merged = make_eas(family, "cpu", skip, "running").merge_and_unload()
    config = config_in_vllm(merged)
    inputs = make_inputs(family, "cpu", batch=1)
    inputs.pop("attention_mask")
    expected = logits(merged.base_model, inputs)
    for _ in range(2):  # vLLM builds a model twice
        model = AutoModel.from_config(config).eval()
        assert list(attentions(model).values()) == list(range(LAYERS - len(skip)))
        assert config.num_hidden_layers == LAYERS - len(skip)
        assert model.config.num_hidden_layers == LAYERS
        assert sum(isinstance(module, SkippedMHA) for module in model.modules()) == len(skip)
        model.load_state_dict(merged.base_model.state_dict())
        assert difference(logits(model, {**inputs, "use_cache": False}), expected) < 1e-5
    assert merged.config.num_hidden_layers == LAYERS  # nobody else's config


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_layer_types_are_the_kept_ones(family):
    merged = make_eas(family, "cpu", [0, 1], "running").merge_and_unload()
    config = config_in_vllm(merged)
    kept = merged.config.layer_types[2:]
    for _ in range(2):
        model = AutoModel.from_config(config)
        assert config.layer_types == kept
        assert model.config.layer_types == merged.config.layer_types


def test_the_kept_attentions_follow_the_config_of_vllm():
    """It names another attention there once the model is built."""
    merged = make_eas("llama", "cpu", [1], "running").merge_and_unload()
    config = config_in_vllm(merged)
    model = AutoModel.from_config(config)
    config._attn_implementation = "vllm_mla"
    kept = [model.get_submodule(name) for name in attentions(model)]
    assert len(kept) == 3
    assert {module.config._attn_implementation for module in kept} == {"vllm_mla"}


@pytest.mark.filterwarnings("ignore:.*context='prompt'")
@pytest.mark.parametrize("context", ["running", "prompt"])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_sglang_is_refused(family, context):
    """Its backend sets its own attention in the text model's config, as vLLM's does."""
    config = copy.deepcopy(make_eas(family, "cpu", [1], context).merge_and_unload(context=context).config)
    config.get_text_config()._attn_implementation = "sglang"
    with pytest.raises(ValueError, match=r"SGLang cannot run.*vLLM and --trust-remote-code --model-impl transformers"):
        AutoModel.from_config(config)


def test_text_model_of_a_multi_modal_one():
    merged = make_eas("llava", "cpu", [0, 2], "running").merge_and_unload()
    config = config_in_vllm(merged)
    for _ in range(2):
        model = AutoModel.from_config(config)
        assert attentions(model) == {f"language_model.layers.{i}.self_attn": n for i, n in ((1, 0), (3, 1))}
        assert config.text_config.num_hidden_layers == 2
        assert config.vision_config.num_hidden_layers == LAYERS
    assert merged.config.text_config.num_hidden_layers == LAYERS


def test_attentions_of_a_vision_tower_do_not_count():
    family = ARCHITECTURES["llava"]
    merged = make(family, "first", on_request=True).merge_and_unload()
    config = config_in_vllm(merged)
    model = AutoModel.from_config(config)
    assert config.text_config.num_hidden_layers == 4
    assert list(attentions(model).values()) == [0, 1, 2, 3]
    assert len(ignored(model, merged)) == 1


def ignored(model, merged):
    """The weights of the checkpoint that vLLM's loader drops."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected]
    return {name for name in merged.state_dict() if any(pattern.search(name) for pattern in patterns)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "llava", "bert"])
def test_the_loader_passes_over_the_markers_and_nothing_else(family):
    merged = make_eas(family, "cpu", [0, 2], "running").merge_and_unload()
    model = AutoModel.from_config(config_in_vllm(merged))
    markers = {name for name, value in merged.state_dict().items() if value.numel() == 0}
    assert len(markers) == 2
    assert ignored(model, merged) == markers
    assert not any(".h.3." in pattern for pattern in type(model)._keys_to_ignore_on_load_unexpected or ())


def test_an_encoder():
    merged = make_eas("bert", "cpu", [0, 2], "running").merge_and_unload()
    config = config_in_vllm(merged)
    for _ in range(2):
        model = AutoModel.from_config(config)
        assert list(attentions(model).values()) == [0, 1]
        assert config.num_hidden_layers == 2


def test_a_head_whose_body_is_a_merged_model_of_its_own():
    merged = make_eas("llama", "cpu", [0, 2], "running").merge_and_unload()
    config = config_in_vllm(merged)
    for _ in range(2):
        model = AutoModelForSequenceClassification.from_config(config)
        assert list(attentions(model).values()) == [0, 1]
        assert (config.num_hidden_layers, model.config.num_hidden_layers) == (2, LAYERS)
        assert len(model.model.layers) == LAYERS
    AutoModel.from_config(config)
    assert config.num_hidden_layers == 2


def test_the_shift_in_front_of_experts_outlives_another_forward_pass():
    """vLLM gives a mixture of experts its own, in place of the module's."""
    merged = make(ARCHITECTURES["mixtral"], "some").merge_and_unload()
    model = AutoModel.from_config(config_in_vllm(merged)).eval()
    model.load_state_dict(merged.model.state_dict())
    blocks = [module for module in model.modules() if hasattr(module, "eas_shift")]
    assert len(blocks) == 2
    for block in blocks:
        assert block.eas_shift.abs().max() > 0
        block.forward = types.MethodType(lambda self, z: z, block)
        z = torch.randn(1, 3, block.eas_shift.numel())
        assert torch.equal(block(z), z + block.eas_shift)


def test_a_model_that_has_only_new_biases():
    merged = make_eas("llama", "cpu", [], "running").merge_and_unload()
    config = config_in_vllm(merged)
    model = AutoModel.from_config(config)
    assert list(attentions(model).values()) == list(range(LAYERS))
    assert config.num_hidden_layers == LAYERS
    assert model.supports_pp_plan


def test_a_layer_of_another_kind_stays_one_to_vllm():
    """Which refuses a linear attention, and must not take the next one for it."""
    merged = make_eas("llama", "cpu", [1], "running").merge_and_unload()
    config = config_in_vllm(merged)
    model = AutoModel.from_config(config)
    model.layers[2].self_attn = nn.Identity()
    assert list(attentions(model).values()) == [0, 2]
    assert config.num_hidden_layers == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def test_each_prompts_own_context_is_refused():
    merged = make_eas("llama", "cpu", [1]).merge_and_unload(context="prompt")
    with pytest.raises(ValueError, match=r'context="prompt".*freeze_context\(\).*merge again'):
        AutoModel.from_config(config_in_vllm(merged))


def test_a_model_without_any_attention_is_refused():
    merged = make_eas("llama", "cpu", [0, 1, 2, 3], "running").merge_and_unload()
    with pytest.raises(ValueError, match=r"All attentions of this model are deleted.*Use transformers"):
        AutoModel.from_config(config_in_vllm(merged))


def test_deleted_attentions_of_several_kinds_are_refused():
    merged = make(ARCHITECTURES["bart"], "some").merge_and_unload()
    config = copy.deepcopy(merged.config)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"several kinds.*decoder\.layers\.N.*encoder\.layers\.N"):
        AutoModel.from_config(config)


def test_latent_attentions_need_the_type_of_the_base():
    """By which vLLM knows them."""
    merged = make(ARCHITECTURES["deepseek_v3"], "some").merge_and_unload()
    config = config_in_vllm(merged)
    with pytest.raises(ValueError, match=r"'eas_deepseek_v3'.*hf_overrides=\{'model_type': 'deepseek_v3'\}"):
        AutoModel.from_config(config)
    config.model_type = "deepseek_v3"
    for _ in range(2):
        model = AutoModel.from_config(config)
        assert list(attentions(model).values()) == [0, 1]


def test_images_that_are_attended_to_both_ways():
    """Which vLLM knows by the type of the stock config, or by this."""
    both_ways = {
        name: merged_config_class(getattr(transformers, name)) for name in ("Gemma3Config", "PaliGemmaConfig")
    }
    assert all(config_class.is_mm_prefix_lm for config_class in both_ways.values())
    assert not merged_config_class(transformers.LlavaConfig).is_mm_prefix_lm


def test_a_pipeline_is_refused():
    merged = make_eas("llama", "cpu", [1], "running").merge_and_unload()
    assert merged.supports_pp_plan == transformers.LlamaForCausalLM(merged.config).supports_pp_plan
    model = AutoModel.from_config(config_in_vllm(merged))
    with pytest.raises(ValueError, match="Set pipeline_parallel_size=1, and use tensor_parallel_size"):
        _ = model.supports_pp_plan


def test_stock_models_are_left_alone():
    model = build_model("llama")
    config = config_in_vllm(model)
    assert len(attentions(AutoModel.from_config(config))) == LAYERS
    assert not hasattr(config, "eas_all_layers")
