"""A merge is exact, changes nothing before it is sure to succeed, and gives a model like any other."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers
from conftest import (
    ALL,
    DECODERS,
    FAMILIES,
    LAYERS,
    SKIPS,
    add_eas,
    build_model,
    difference,
    logits,
    make_eas,
    make_inputs,
    mha_names,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from peft_eas import EASConfig

AUTO = {
    "llava": transformers.AutoModelForImageTextToText,
    "bert": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
}
TEXT = [*DECODERS, "llava"]
SOME_SKIPS = ["none", "first", "half", "all"]


def auto_class(family):
    """The Auto class of the family's head."""
    return AUTO.get(family, AutoModelForCausalLM)


def snapshot(model):
    """Copies of all that a state dict holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    """Whether the state dict is what it was, bit by bit, and NaN where it was NaN."""
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(torch.nan_to_num(value), torch.nan_to_num(before[name])) for name, value in after.items()
    )


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_merged_is_unmerged(family, skip, groups, device):
    model = make_eas(family, device, SKIPS[skip], "running", groups=groups, scale=1.3, router_temperature=0.7)
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    assert difference(logits(build_model(family, device), inputs), expected) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    assert not [name for name, _ in merged.named_modules() if "eas_" in name or "base_layer" in name]
    assert not merged._forward_pre_hooks


@pytest.mark.parametrize("family", ALL)
def test_in_bfloat16(family, device):
    inputs = make_inputs(family, device)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    model = make_eas(family, device, SKIPS["half"], "running").bfloat16()
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert difference(logits(merged, inputs), expected) <= 0.1  # rounded anew at every layer; see test_fold for one


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", TEXT)
def test_merged_is_unmerged_with_padding_and_labels(family, skip, device):
    model = make_eas(family, device, SKIPS[skip], "running")
    inputs = make_inputs(family, device)
    inputs["attention_mask"][0, :3] = 0
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**inputs)
        actual = model.merge_and_unload()(**inputs)
    assert difference(actual.logits, expected.logits) <= 1e-5
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_merging_by_hand(device):
    """One kept MHA of width 2: W' = W + s W Ū C and b' = s W (Ū c + β), with numbers that can be checked."""
    sizes = {"vocab_size": 5, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=1)).to(device)
    config = EASConfig(attention_r=1, r=1, groups=1, scale=2.0, skipped_modules=[], context="running")
    model = get_peft_model(base, config)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        for name, parameter in model.named_parameters():
            if "token_down.weight" in name:
                parameter.copy_(torch.tensor([[1.0, -1.0]]))
            elif "token_down.bias" in name:
                parameter.fill_(3.0)
            elif ".up." in name:
                values = [[1.0], [2.0]] if "weight" in name else [0.0, 1.0]
                parameter.copy_(torch.tensor(values))
            elif ".router." in name:
                parameter.zero_()  # both paths, which are alike here, count ½
    attention = model.merge_and_unload().get_submodule("model.layers.0.self_attn")
    # W Ū = (5, 11); Ū c + β = (3, 7).
    assert attention.q_proj.weight.tolist() == [[11.0, -8.0], [25.0, -18.0]]
    assert attention.q_proj.bias.tolist() == [34.0, 74.0]
    assert attention.o_proj.bias is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merging_with_the_prompts_context_says_so(family, device):
    model = make_eas(family, device, SKIPS["half"], "prompt")
    running = make_eas(family, device, SKIPS["half"], "running")
    inputs = make_inputs(family, device)
    expected = logits(running, inputs)
    with pytest.warns(UserWarning, match=r"context='prompt'.*running mean.*freeze_context\(\)") as caught:
        merged = model.merge_and_unload()
    assert len([w for w in caught if "running mean" in str(w.message)]) == 1
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_adapters_that_read_no_context_merge_without_a_warning(device):
    """Those of kept MHAs, without a router."""
    model, inputs = make_eas("llama", device, [], "prompt", paths=1), make_inputs("llama", device)
    expected = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_without_a_context_merging_is_exact_and_warns_of_nothing(family, device):
    inputs = make_inputs(family, device)
    model = make_eas(family, device, [0, 2], "none")
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=r"has no context \(context='none'\).*merge_and_unload\(\) alone"):
        model.merge_and_unload(context="prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_a_base_in_training_mode_stays_there(device):
    merged = make_eas("llama", device, [0, 2], "running").train().merge_and_unload()
    assert all(module.training for module in merged.modules())
    merged = make_eas("llama", device, [0, 2], "running").eval().merge_and_unload()
    assert not any(module.training for module in merged.modules())


def test_progressbar(device, capsys):
    make_eas("llama", device, [0, 2], "running").merge_and_unload(progressbar=True)
    assert "100%" in capsys.readouterr().err


# --- merge_adapter, unmerge_adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_merge_in_place_and_back(family, skip, device):
    model = make_eas(family, device, SKIPS[skip], "running")
    inputs = make_inputs(family, device)
    expected, before = logits(model, inputs), snapshot(model)
    with model.disable_adapter():
        base = logits(model, inputs)
    for _ in range(2):
        model.merge_adapter()
        assert difference(logits(model, inputs), expected) <= 1e-5
        model.unmerge_adapter()
        assert difference(logits(model, inputs), expected) <= 1e-5
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, value in after.items():
            torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert difference(logits(model, inputs), base) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_disabling_a_merged_adapter_unmerges_it(family, device):
    model = make_eas(family, device, [0, 2], "running")
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    model.merge_adapter()
    base = logits(build_model(family, device), inputs)
    with model.disable_adapter():
        assert difference(logits(model, inputs), base) <= 1e-5
    assert difference(logits(model, inputs), expected) <= 1e-5
    assert difference(logits(model.merge_and_unload(), inputs), expected) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_merge_and_unload_after_merge_adapter(family, device, tmp_path):
    model = make_eas(family, device, [0, 2], "running")
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    model.merge_adapter()
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path).to(device)
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_unload_after_merge_adapter(family, device):
    model = make_eas(family, device, [0, 2], "running")
    model.merge_adapter()
    base, inputs = build_model(family, device), make_inputs(family, device)
    unloaded = model.unload()
    assert difference(logits(unloaded, inputs), logits(base, inputs)) <= 1e-5
    assert unloaded.state_dict().keys() == base.state_dict().keys()


def test_merging_twice_in_place_is_said_and_harmless(device):
    model = make_eas("llama", device, [0, 2], "running")
    model.merge_adapter()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert unchanged(model, before)


def test_an_adapter_saved_while_merged_is_the_adapter(device, tmp_path):
    model = make_eas("llama", device, [0, 2], "running")
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[key], merged[key]) for key in before)


def test_the_skip_set_cannot_change_while_merged(device):
    model = get_peft_model(
        build_model("llama", device),
        EASConfig(r=8, attention_r=4, num_skip=2, init_weights=False, context="running", dropout=0.0),
    ).eval()
    model.set_skipped_modules(mha_names("llama", [1]))
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    model.merge_adapter()
    for method in (model.set_skipped_modules, model.fix_skipped_modules):
        with pytest.raises(ValueError, match=r"merged.*unmerge_adapter\(\)"):
            method(mha_names("llama", [2]))
    assert model.skipped_modules == mha_names("llama", [1])
    assert difference(logits(model, inputs), expected) <= 1e-5
    model.unmerge_adapter()
    model.set_skipped_modules(mha_names("llama", [2]))


def test_merging_within_a_search_takes_the_set_in_force(device):
    model = get_peft_model(
        build_model("llama", device),
        EASConfig(r=8, attention_r=4, num_skip=2, init_weights=False, context="running", dropout=0.0),
    ).eval()
    model.set_skipped_modules(mha_names("llama", [1, 2]))
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    names = {name.split(".self_attn.")[0] for name, _ in merged.named_parameters() if ".self_attn." in name}
    assert names == {"model.layers.0", "model.layers.3"}


def test_a_search_that_never_ran_is_said(device):
    """The callback was forgotten: all that there is to see otherwise is a model that has not become smaller."""
    model = get_peft_model(build_model("llama", device), EASConfig(num_skip=2, context="running")).eval()
    with pytest.warns(UserWarning, match=r"was to skip 2 attentions, but none was chosen.*EASCallback"):
        model.merge_and_unload()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_choosing_which_adapter_to_merge(family, device):
    inputs = make_inputs(family, device)
    expected = {}
    model = None
    for name, layers in (("default", [0, 1]), ("b", [3])):
        alone = make_eas(family, device, layers, "running", groups=2 if name == "b" else 1)
        expected[name] = logits(alone, inputs)
        if model is None:
            model = alone
        else:
            model.add_adapter(name, alone.peft_config["default"])
            source = {k.replace(".default.", f".{name}."): v for k, v in alone.state_dict().items()}
            missing, unexpected = model.load_state_dict({**model.state_dict(), **source})
            assert not missing
            assert not unexpected
    assert difference(logits(copy.deepcopy(model).merge_and_unload(), inputs), expected["default"]) <= 1e-5
    assert difference(logits(model.merge_and_unload(adapter_names=["b"]), inputs), expected["b"]) <= 1e-5


# --- modules_to_save, unload -----------------------------------------------------------------------------------------


def test_modules_to_save_are_kept(device, tmp_path):
    model = make_eas("llama", device, [0, 2], "running", modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    assert type(merged.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_unload_gives_the_base_back_bit_by_bit(family, skip, device, tmp_path):
    base = build_model(family, device)
    inputs, before, config = make_inputs(family, device), snapshot(base), base.config.to_dict()
    expected = logits(base, inputs)
    unloaded = add_eas(base, family, SKIPS[skip]).unload()
    assert unloaded is base
    assert type(unloaded) is getattr(transformers, FAMILIES[family][1])
    assert unchanged(unloaded, before)
    assert unloaded.config.to_dict() == config
    assert torch.equal(logits(unloaded, inputs), expected)
    unloaded.save_pretrained(tmp_path)
    assert torch.equal(logits(type(base).from_pretrained(tmp_path).to(device), inputs), expected)
    again = add_eas(unloaded, family, SKIPS[skip])  # and adapters can be put on it anew
    assert not torch.equal(logits(again, inputs), expected)


# --- safe_merge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("where", ["eas_pia.default.up.1.bias", "eas_input.default.token_down.weight",
                                   "eas_pia.default.running_context", "eas_input.default.router.weight"])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_safe_merge_finds_a_nan_before_anything_changes(family, value, where, method, device):
    """In the last layer that has such an adapter, so that an eager merge would have changed the others."""
    model = make_eas(family, device, [0, 2], "running")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [name for name in tensors if name.endswith(where)]
    tensors[names[-1]].data.fill_(value)  # a single infinity may be a router's, all on one path
    before, modules = snapshot(model), [name for name, _ in model.named_modules()]
    block = names[-1].split("base_model.model.")[1].split(".eas_")[0].rpartition(".")[0]
    with pytest.raises(ValueError, match=rf"NaN or infinity into {block}.*Nothing was changed"):
        getattr(model, method)(safe_merge=True)
    assert unchanged(model, before)
    assert [name for name, _ in model.named_modules()] == modules
    with model.disable_adapter():
        inputs = make_inputs(family, device)
        assert torch.equal(logits(model, inputs), logits(build_model(family, device), inputs))


@pytest.mark.parametrize("family", ALL)
def test_safe_merge_of_sound_weights_is_a_merge(family, device):
    inputs = make_inputs(family, device)
    merged = [make_eas(family, device, [0, 2], "running").merge_and_unload(safe_merge=safe) for safe in (False, True)]
    assert torch.equal(logits(merged[0], inputs), logits(merged[1], inputs))


# --- save and load ---------------------------------------------------------------------------------------------------


def load_strictly(auto, folder, **options):
    """Loads a checkpoint that must fit its class without a missing, unexpected or mismatched key."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


@pytest.mark.parametrize("skip", SOME_SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_save_and_load(family, skip, device, tmp_path):
    merged = make_eas(family, device, SKIPS[skip], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    expected = logits(merged, inputs)
    merged.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(merged, inputs), expected)  # saving changes nothing
    loaded = load_strictly(auto_class(family), tmp_path / "one").to(device)
    assert torch.equal(logits(loaded, inputs), expected)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.state_dict().keys() == merged.state_dict().keys()
    loaded.save_pretrained(tmp_path / "two")  # and once more
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    for part in (config.get(key, {}) for config in configs for key in ("text_config", "vision_config")):
        part.pop("dtype", None)  # which transformers notes on loading
    assert configs[0] == configs[1]
    again = load_strictly(auto_class(family), tmp_path / "two").to(device)
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize("family", ALL)
def test_a_merged_base_that_was_loaded_from_disk(family, device, tmp_path):
    """Models that come from a checkpoint may carry conversions of its names."""
    build_model(family, device).save_pretrained(tmp_path / "base")
    base = auto_class(family).from_pretrained(tmp_path / "base").to(device)
    merged = add_eas(base, family, [0, 2], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_strictly(auto_class(family), tmp_path / "merged").to(device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("_name_or_path") in (None, "")


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "gpt2"])
def test_a_base_model_without_a_head(family, device, tmp_path):
    model_class = {"llama": "LlamaModel", "bert": "BertModel", "vit": "ViTModel", "gpt2": "GPT2Model"}[family]
    base = build_model(family, device, model_class)
    names = [name.partition(".")[2] for name in mha_names(family, [0, 2])]
    config = EASConfig(r=8, attention_r=4, dropout=0.0, init_weights=False, context="running", skipped_modules=names)
    model = get_peft_model(base, config).eval()
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    loaded = load_strictly(AutoModel, tmp_path).to(device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_the_body_of_a_model_with_a_head(family, device, tmp_path):
    """A checkpoint of a model with a head gives its body to AutoModel, with the same MHAs gone."""
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path).to(device)
    inputs = make_inputs(family, device)
    with torch.no_grad():
        expected = merged.base_model(**inputs).last_hidden_state
        assert torch.equal(body(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_headless_checkpoint_gets_a_new_head(family, device, tmp_path):
    model_class = {"llama": "LlamaModel", "bert": "BertModel"}[family]
    names = [name.partition(".")[2] for name in mha_names(family, [0, 2])]
    base = build_model(family, device, model_class)
    merged = get_peft_model(base, EASConfig(context="running", skipped_modules=names)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    auto = auto_class(family)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    heads = ("lm_head", "score", "classifier", "bert.pooler")
    assert all(key.startswith(heads) for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert "q_proj" not in str([n for n, _ in loaded.named_parameters() if ".0." in n])


def test_tied_embeddings(device, tmp_path):
    base = build_model("llama", device, tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    merged = add_eas(base, "llama", [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_strictly(AutoModelForCausalLM, tmp_path).to(device)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    inputs = make_inputs("llama", device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


def test_in_several_shards(device, tmp_path):
    merged = make_eas("llama", device, [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_strictly(AutoModelForCausalLM, tmp_path).to(device)
    inputs = make_inputs("llama", device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_loading_in_another_dtype(family, device, tmp_path):
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = load_strictly(auto_class(family), tmp_path, dtype=torch.bfloat16).to(device)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name).bfloat16())
    assert torch.isfinite(logits(loaded, make_inputs(family, device))).all()


@pytest.mark.parametrize("family", ALL)
def test_the_config_records_what_was_skipped(family, device, tmp_path):
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path)
    for config in (merged.config, AutoConfig.from_pretrained(tmp_path)):
        recorded = list(config.eas["skipped"])
        assert len(recorded) == 2
        assert all(name.endswith(short) for name, short in zip(mha_names(family, [0, 2]), recorded))
    stock = AutoConfig.from_pretrained(tmp_path)
    assert stock.model_type != build_model(family, "cpu").config.model_type
    assert stock.to_dict().keys() >= build_model(family, "cpu").config.to_dict().keys() - {"architectures"}


def test_labels_of_a_classifier_survive(device, tmp_path):
    base = build_model("bert", device)
    base.config.id2label = {0: "red", 1: "green", 2: "blue"}
    base.config.label2id = {"red": 0, "green": 1, "blue": 2}
    merged = add_eas(base, "bert", [0, 2], "running").merge_and_unload()
    merged.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert config.label2id == base.config.label2id
    assert config.num_labels == 3
    assert load_strictly(auto_class("bert"), tmp_path).config.id2label == config.id2label


def test_nothing_skipped_and_nothing_adapted_stays_a_stock_model(device, tmp_path):
    config = EASConfig(attention_r=0, skipped_modules=[], context="running")
    merged = get_peft_model(build_model("llama", device), config).merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM
    merged.save_pretrained(tmp_path)
    inputs = make_inputs("llama", device)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).to(device)
    assert torch.equal(logits(loaded, inputs), logits(build_model("llama", device), inputs))


def test_files_shrink_with_what_is_skipped(device, tmp_path):
    sizes = {}
    for skip in ("none", "half", "all"):
        make_eas("llama", device, SKIPS[skip], "running").merge_and_unload().save_pretrained(tmp_path / skip)
        sizes[skip] = (tmp_path / skip / "model.safetensors").stat().st_size
    attention = 4 * (32 * 32 * 2 + 2 * 32 * 16)
    assert sizes["none"] - sizes["half"] == pytest.approx(2 * attention, rel=0.1)
    assert sizes["half"] - sizes["all"] == pytest.approx(2 * attention, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pickle_and_deepcopy(family, device):
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert type(copied) is type(merged)
        assert torch.equal(logits(copied, inputs), logits(merged, inputs))


def test_merging_one_model_leaves_the_stock_classes_alone(device):
    make_eas("llama", device, [0, 2], "running").merge_and_unload()
    stock = build_model("llama", device)
    assert type(stock) is transformers.LlamaForCausalLM
    assert type(stock.config) is transformers.LlamaConfig
    assert len([name for name, _ in stock.named_parameters() if "q_proj" in name]) == LAYERS


def test_skipping_in_both_towers(device, tmp_path):
    names = ["model.vision_tower.encoder.layers.1.self_attn", *mha_names("llava", [0])]
    base = build_model("llava", device)
    model = add_eas(base, "llava", [], target_modules=r".*self_attn", skipped_modules=names, context="running")
    assert len(model.candidates) == 2 * LAYERS
    inputs = make_inputs("llava", device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    loaded = load_strictly(auto_class("llava"), tmp_path).to(device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


# --- the merged model lives on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_a_merged_model_trains(family, reload, device, tmp_path):
    """All of its parameters, the biases that the fold has added included."""
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    if reload:
        merged.save_pretrained(tmp_path)
        merged = auto_class(family).from_pretrained(tmp_path).to(device)
    merged.train().requires_grad_(True)
    inputs = make_inputs(family, device)
    if family in TEXT:
        inputs["labels"] = inputs["input_ids"]
    else:
        inputs["labels"] = torch.tensor([0, 2], device=device)
    if family == "llava":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == 60, -100)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = merged(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in merged.named_parameters():
        if "vision" not in name and "pooler" not in name:  # Llava leaves its vision tower's last layer out
            assert parameter.grad is not None, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_lora_on_top_of_a_merged_model(family, checkpointing, device, tmp_path):
    merged = make_eas(family, device, [0, 2], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    expected = logits(merged, inputs)
    targets = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}.get(family, ["q_proj", "up_proj"])
    merged.save_pretrained(tmp_path / "base")
    model = get_peft_model(merged, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    lora_layers = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert lora_layers
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    (model(**inputs).logits.square().mean()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    model.eval()
    adapted = logits(model, inputs)
    assert difference(adapted, expected) > 1e-3
    model.save_pretrained(tmp_path / "lora")
    again = auto_class(family).from_pretrained(tmp_path / "base").to(device)
    again = PeftModel.from_pretrained(again, tmp_path / "lora")
    assert difference(logits(again.eval(), inputs), adapted) <= 1e-6
    twice = model.merge_and_unload()
    assert difference(logits(twice, inputs), adapted) <= 1e-5
    twice.save_pretrained(tmp_path / "twice")
    loaded = load_strictly(auto_class(family), tmp_path / "twice").to(device)
    assert difference(logits(loaded, inputs), adapted) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_eas_on_top_of_a_merged_model(family, device, tmp_path):
    """A second search over what the first has left."""
    merged = make_eas(family, device, [0], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    torch.manual_seed(3)
    config = EASConfig(
        r=8, attention_r=4, dropout=0.0, init_weights=False, context="running",
        skipped_modules=mha_names(family, [2]),
    )  # fmt: skip
    model = get_peft_model(merged, config).eval()
    assert model.candidates == mha_names(family, [1, 2, 3])
    expected = logits(model, inputs)
    twice = model.merge_and_unload()
    assert difference(logits(twice, inputs), expected) <= 1e-5
    twice.save_pretrained(tmp_path)
    loaded = load_strictly(auto_class(family), tmp_path).to(device)
    assert difference(logits(loaded, inputs), expected) <= 1e-5
