"""Merged with each prompt's own context: what the unmerged model computes, for any batch and any padding."""

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ALL, DECODERS, SKIPS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_merge import auto_class, load_strictly
from transformers import AutoModelForTokenClassification, StaticCache

from peft_eas import EASConfig

TEXT = [*DECODERS, "llava", "bert"]


def padded_inputs(family, device):
    """A batch in which one sequence is padded on the left, where the family has a mask."""
    inputs = make_inputs(family, device, batch=3)
    if family in (*DECODERS, "bert"):
        inputs["attention_mask"][0, :3] = 0
    return inputs


def attended(tensor, inputs):
    """What has a meaning in `tensor`: the values at the tokens that are attended to."""
    return tensor[inputs["attention_mask"].bool()] if tensor.dim() == 3 and "attention_mask" in inputs else tensor


@pytest.mark.parametrize("attention_r", [0, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_merged_is_unmerged(family, skip, groups, attention_r, device):
    model = make_eas(family, device, SKIPS[skip], groups=groups, attention_r=attention_r)
    inputs = padded_inputs(family, device)
    expected = logits(model, inputs)
    actual = logits(model.merge_and_unload(context="prompt"), inputs)
    assert difference(attended(actual, inputs), attended(expected, inputs)) <= 1e-5


@pytest.mark.parametrize("family", TEXT)
def test_a_batch_is_its_sequences_one_by_one(family, device):
    """Each sequence has a context of its own, which the adapter feels."""
    merged = make_eas(family, device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs(family, device, batch=3)
    together = logits(merged, inputs)
    for i in range(3):
        alone = logits(merged, {name: value[i : i + 1] for name, value in inputs.items()})
        assert difference(together[i : i + 1], alone) <= 1e-5
    if family in DECODERS:
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        mask[:, 6:] = False
        assert difference(logits(merged, {**inputs, "eas_prompt_mask": mask}), together) > 1e-3


@pytest.mark.parametrize("family", [*DECODERS, "llava"])
def test_labels_tell_the_prompt(family, device):
    model = make_eas(family, device, SKIPS["half"])
    inputs = make_inputs(family, device)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-4] = -100
    with torch.no_grad():
        expected = model(**inputs)
        actual = model.merge_and_unload(context="prompt")(**inputs)
    assert difference(actual.logits, expected.logits) <= 1e-5
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_no_leak(family, device):
    merged = make_eas(family, device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs(family, device)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-4] = -100
    before = logits(merged, inputs)
    inputs["input_ids"][:, -1] = (inputs["input_ids"][:, -1] + 1) % 50 + 1
    after = logits(merged, inputs)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])


@pytest.mark.parametrize("family", ALL)
def test_weights_stay_and_attention_goes(family, device):
    base = build_model(family, device)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = add_eas(base, family, SKIPS["half"], output_r=0).merge_and_unload(context="prompt")
    for name, value in merged.state_dict().items():
        if "eas_adapter" not in name and value.numel() > 0:
            assert torch.equal(value, before[name])
    for name in mha_names(family, SKIPS["half"]):
        left = dict(merged.get_submodule(name).named_parameters())
        assert all("LayerNorm" in key for key in left)


@pytest.mark.parametrize("family", ALL)
def test_in_bfloat16(family, device, tmp_path):
    model = make_eas(family, device, SKIPS["half"])
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload(context="prompt")
    merged.save_pretrained(tmp_path)
    loaded = load_strictly(auto_class(family), tmp_path, dtype=torch.bfloat16).to(device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    actual = logits(loaded, inputs).float()
    assert (actual - expected).norm() / expected.norm() < 0.1


def test_adapters_in_float32_on_a_base_in_bfloat16(device):
    base = build_model("llama", device).bfloat16()
    model = get_peft_model(base, EASConfig(r=8, skipped_modules=mha_names("llama", [0, 2]), init_weights=False)).eval()
    adapters = [p for name, p in model.named_parameters() if ".eas_" in name]
    assert {p.dtype for p in adapters} == {torch.float32}  # as PEFT makes them
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs).float()
    merged = model.merge_and_unload(context="prompt")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged, inputs).float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_lora_on_top(family, reload, device, tmp_path):
    merged = make_eas(family, device, SKIPS["half"]).merge_and_unload(context="prompt")
    if reload:
        merged.save_pretrained(tmp_path)
        merged = auto_class(family).from_pretrained(tmp_path).to(device)
    inputs = make_inputs(family, device)
    expected = logits(merged, inputs)
    targets = {"llama": ["gate_proj"], "gpt2": ["c_fc"], "bert": ["query"], "vit": ["fc1"]}[family]
    model = get_peft_model(merged, LoraConfig(target_modules=targets))
    assert difference(logits(model, inputs), expected) <= 1e-6
    if family == "llama":
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_both_towers(device):
    base = build_model("llava", device)
    names = [*mha_names("llava", [0, 2]), "model.vision_tower.layers.1.self_attn"]
    names[-1] = next(n for n, _ in base.named_modules() if n.endswith("layers.1.self_attn") and "vision" in n)
    config = EASConfig(r=8, init_weights=False, skipped_modules=names, target_modules=r".*self_attn", dropout=0.0)
    model = get_peft_model(base, config).eval()
    inputs = make_inputs("llava", device)
    expected = logits(model, inputs)
    assert difference(logits(model.merge_and_unload(context="prompt"), inputs), expected) <= 1e-5


def test_after_merge_adapter(device):
    """What was folded with the running context is taken out first."""
    model = make_eas("llama", device, SKIPS["half"])
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="takes its context from each prompt"):
        model.merge_adapter()
    assert difference(logits(model, inputs), expected) > 1e-3
    merged = model.merge_and_unload(context="prompt")
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_modules_to_save_are_kept(device):
    base = build_model("llama", device)
    config = EASConfig(r=8, skipped_modules=mha_names("llama", [1]), modules_to_save=["lm_head"], init_weights=False)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    merged = model.merge_and_unload(context="prompt")
    assert type(merged.lm_head) is torch.nn.Linear
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_a_file_holds_no_more_than_the_adapters(device, tmp_path):
    merged = make_eas("llama", device, SKIPS["half"], attention_r=0).merge_and_unload(context="prompt")
    merged.save_pretrained(tmp_path)
    added = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "eas_adapter" in key}
    down, up, router = 2 * (32 * 8 + 8), 2 * (32 * 4 + 32), 2 * 32 + 2
    assert sum(value.numel() for value in added.values()) == 2 * (down + up + router)


def test_static_is_the_default(device):
    """An explicit context="running" folds as the default does, and has nothing to warn of."""
    one, two = (make_eas("llama", device, SKIPS["half"]) for _ in range(2))
    inputs = make_inputs("llama", device)
    with pytest.warns(UserWarning, match=r"merge_and_unload\(context='prompt'\)"):
        expected = logits(one.merge_and_unload(), inputs)
    with warnings.catch_warnings(record=True) as caught:
        merged = two.merge_and_unload(context="running")
    assert not any("takes its context from each prompt" in str(w.message) for w in caught)
    assert torch.equal(logits(merged, inputs), expected)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_context_that_is_none(device):
    model = make_eas("llama", device, SKIPS["half"])
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=r"context='mean' was received.*'running' or context='prompt'"):
        model.merge_and_unload(context="mean")
    assert torch.equal(logits(model, inputs), expected)


def test_a_frozen_context(device):
    model = make_eas("llama", device, SKIPS["half"], "running")
    with pytest.raises(ValueError, match=r"frozen context.*merge_and_unload\(\) alone"):
        model.merge_and_unload(context="prompt")
    model.merge_and_unload()


def test_safe_merge(device):
    model = make_eas("llama", device, SKIPS["half"])
    inputs = make_inputs("llama", device)
    with torch.no_grad():
        bias = next(p for name, p in model.named_parameters() if "eas_pia" in name and "up.0.bias" in name)
        bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"holds NaN or infinity. Nothing was changed"):
        model.merge_and_unload(context="prompt", safe_merge=True)
    with torch.no_grad():
        bias[0] = 0.0
    expected = logits(model, inputs)
    merged = model.merge_and_unload(context="prompt", safe_merge=True)
    assert difference(logits(merged, inputs), expected) <= 1e-5


def test_another_eas_adapter_on_top(device):
    merged = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs("llama", device)
    expected = logits(merged, inputs)
    with pytest.raises(ValueError, match=r"merged with context='prompt' and still has its adapters.*freeze_context"):
        get_peft_model(merged, EASConfig(num_skip=1))
    assert torch.equal(logits(merged, inputs), expected)


def test_a_cache_of_another_model(device):
    static = make_eas("llama", device, SKIPS["half"], "running").merge_and_unload()
    prompted = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs("llama", device)
    with torch.no_grad():
        cache = static(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"holds 12 tokens of layer 0.*filled by another model.*new cache"):
            prompted(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("attention_r", [0, 4])
def test_a_cache_that_is_cropped_to_nothing_serves_another_prompt(attention_r, device):
    merged = make_eas("llama", device, SKIPS["half"], attention_r=attention_r).merge_and_unload(context="prompt")
    first, second = (make_inputs("llama", device, seed=seed) for seed in (3, 4))
    with torch.no_grad():
        cache = merged(**first, use_cache=True).past_key_values
        cache.crop(-12)
        actual = merged(**second, use_cache=True, past_key_values=cache).logits
    assert difference(actual, logits(merged, second)) <= 1e-6


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its compiler breaks on static caches")
def test_decoding_with_a_static_cache_compiles_once(device):
    """However long the cache has become: the prompt's part is found by its presence, not by a length."""
    merged = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs("llama", device)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(merged, backend=count)
    cache = StaticCache(config=merged.config, max_cache_len=32)
    with torch.no_grad():
        merged(**inputs, past_key_values=cache, use_cache=True)
        for step in range(4):
            token = torch.full((2, 1), 5 + step, device=device)
            compiled(input_ids=token, past_key_values=cache, use_cache=True)
    assert len(graphs) == 1


def test_all_linear_layers_of_others_methods_leave_the_adapters_alone(device):
    merged = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs("llama", device)
    model = get_peft_model(merged, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    assert not any("eas_adapter" in name for name, p in model.named_parameters() if p.requires_grad)
    expected = logits(model, inputs)
    assert difference(logits(model.merge_and_unload(), inputs), expected) <= 1e-5


def test_several_threads(device):
    merged = make_eas("bert", device, SKIPS["half"]).merge_and_unload(context="prompt")
    batches = [make_inputs("bert", device, seed=seed, length=6 + seed) for seed in range(6)]
    expected = [logits(merged, batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            actual = list(pool.map(lambda i: logits(merged, batches[i % 6]), range(60)))
    finally:
        sys.setswitchinterval(interval)
    for i, value in enumerate(actual):
        assert difference(value, expected[i % 6]) <= 1e-5


def test_continuous_batching_is_refused(device):
    merged = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    if not hasattr(merged, "generate_batch"):
        pytest.skip("this transformers has none")
    with pytest.raises(ValueError, match=r"generate_batch\(\) packs several requests.*Use generate\(\)"):
        merged.generate_batch([[1, 2], [3]])


def test_cross_attention_beside(device):
    """GPT-2 with cross attention: another kind of cache, and blocks that run their own code."""
    base = build_model("gpt2", device, add_cross_attention=True)
    config = EASConfig(r=8, attention_r=4, skipped_modules=mha_names("gpt2", [0, 2]), init_weights=False, dropout=0.0)
    model = get_peft_model(base, config).eval()
    inputs = make_inputs("gpt2", device)
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 32, device=device)
    expected = logits(model, {**inputs, "use_cache": False})
    merged = model.merge_and_unload(context="prompt")
    assert difference(logits(merged, {**inputs, "use_cache": False}), expected) <= 1e-5
    assert difference(logits(merged, {**inputs, "use_cache": True}), expected) <= 1e-5


def test_a_token_classifier_sees_no_answer_in_its_labels(device, tmp_path):
    make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt").save_pretrained(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=2).to(device)
    inputs = make_inputs("llama", device)
    labels = inputs["input_ids"] % 2
    assert difference(logits(model, {**inputs, "labels": labels}), logits(model, inputs)) <= 1e-6


def test_a_copied_ffn_is_refused(device):
    merged = make_eas("bert", device, SKIPS["half"]).merge_and_unload(context="prompt")
    ffn = copy.deepcopy(merged.bert.encoder.layer[0].intermediate)
    with pytest.raises(RuntimeError, match=r"without the deleted attention in front.*modules_to_save"):
        ffn(torch.zeros(1, 3, 32, device=device))


def test_chunked_prefill_is_refused(device):
    merged = make_eas("llama", device, SKIPS["half"]).merge_and_unload(context="prompt")
    with pytest.raises(ValueError, match=r"prefill_chunk_size=4 does not go with context='prompt'"):
        merged.generate(**make_inputs("llama", device), prefill_chunk_size=4, max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_copy_is_independent(family, device):
    merged = make_eas(family, device, SKIPS["half"]).merge_and_unload(context="prompt")
    inputs = make_inputs(family, device)
    expected = logits(merged, inputs)
    twin = copy.deepcopy(merged)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if "eas_adapter" in name:
                parameter.add_(1.0)
    assert torch.equal(logits(twin, inputs), expected)
    assert difference(logits(merged, inputs), expected) > 1e-3
