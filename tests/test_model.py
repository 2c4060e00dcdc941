"""Injection: adapters start as the identity, off means off, a skipped MHA is not computed, and nothing leaks."""

import copy
import warnings

import pytest
import torch
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
    warm_up,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache
from transformers.models.gemma2 import modeling_gemma2

from peft_eas import EASConfig, Skippable
from peft_eas.layers import OutputLayer
from peft_eas.runtime.adapter import RoutedAdapter

# Per family and layer: the norm that only feeds the MHA, the projections of the MHA, and the FFN.
PARTS = {
    "gpt2": ("transformer.h.{}.ln_1", ("c_attn", "c_proj"), "transformer.h.{}.mlp"),
    "bert": (None, ("self.query", "self.key", "self.value", "output.dense"), "bert.encoder.layer.{}.intermediate"),
    "vit": ("vit.layers.{}.layernorm_before", ("q_proj", "k_proj", "v_proj", "o_proj"), "vit.layers.{}.mlp"),
    "llava": (
        "model.language_model.layers.{}.input_layernorm",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "model.language_model.layers.{}.mlp",
    ),
}
_LLAMA_PARTS = ("model.layers.{}.input_layernorm", ("q_proj", "k_proj", "v_proj", "o_proj"), "model.layers.{}.mlp")
TEXT = [*DECODERS, "llava"]


def with_labels(inputs: dict, answer: int = 4) -> dict:
    """`inputs` whose last `answer` tokens are learnt."""
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


def without_attention(model: nn.Module, family: str, skip: list[int], device: str) -> nn.Module:
    """`model`, whose MHAs of the layers `skip` return zeros: what a skipped MHA means, done from outside."""

    def zero(module, args, output):
        attention = torch.zeros_like(output[0])
        return (attention, *output[1:])

    def norm_of_residual(module, args, kwargs, output):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return (module.output.LayerNorm(hidden_states), *output[1:])

    for name in mha_names(family, skip):
        mha = model.get_submodule(name)
        if family == "bert":
            mha.register_forward_hook(norm_of_residual, with_kwargs=True)
        else:
            mha.register_forward_hook(zero)
    return model


# --- point 1: identity start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("family", ALL)
def test_a_new_model_with_nothing_skipped_is_the_base_model(family, context, device):
    inputs = make_inputs(family, device)
    expected = logits(build_model(family, device), inputs)
    model = add_eas(build_model(family, device), family, [], context, init_weights=True)
    assert torch.equal(logits(model, inputs), expected)
    model = get_peft_model(build_model(family, device), EASConfig(num_skip=2, context=context)).eval()
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("skip", ["first", "half", "all"])
@pytest.mark.parametrize("family", ALL)
def test_a_new_model_is_the_base_model_without_the_skipped_mhas(family, skip, context, device):
    inputs = make_inputs(family, device)
    base = build_model(family, device)
    full = logits(base, inputs)
    expected = logits(without_attention(base, family, SKIPS[skip], device), inputs)
    model = add_eas(build_model(family, device), family, SKIPS[skip], context, init_weights=True)
    assert difference(logits(model, inputs), expected) <= 1e-5
    assert difference(full, expected) > 0.01


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_without_init_weights_every_adapter_matters(family, skip, device):
    """Each adapter of the model, set back to the identity, changes what the model says."""
    inputs = make_inputs(family, device)
    model = make_eas(family, device, SKIPS[skip])
    expected = logits(model, inputs)
    ups = [name for name, _ in model.named_modules() if name.endswith(".up")]
    assert len(ups) == LAYERS + len(SKIPS[skip])
    for name in ups:
        up = model.get_submodule(name)
        kept = copy.deepcopy(up.state_dict())
        for parameter in up.parameters():
            parameter.data.zero_()
        assert difference(logits(model, inputs), expected) > 1e-4, name
        up.load_state_dict(kept)
    assert torch.equal(logits(model, inputs), expected)


# --- point 2: off means off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_off_means_off(family, skip, context, device):
    base = build_model(family, device)
    inputs = make_inputs(family, device)
    expected, before = logits(base, inputs), {name: value.clone() for name, value in base.state_dict().items()}
    model = make_eas(family, device, SKIPS[skip], context)
    adapted = logits(model, inputs)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), adapted)
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    assert torch.equal(logits(unloaded, inputs), expected)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert not unloaded._forward_pre_hooks
    after = unloaded.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", TEXT)
def test_off_means_off_with_a_cache(family, device):
    inputs = make_inputs(family, device)
    base = build_model(family, device)
    model = make_eas(family, device, [0, 2])
    with torch.no_grad():
        expected = base(**inputs, use_cache=True)
        with model.disable_adapter():
            output = model(**inputs, use_cache=True)
    assert torch.equal(output.logits, expected.logits)
    for mine, theirs in zip(output.past_key_values.layers, expected.past_key_values.layers):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert type(mine) is type(theirs)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_with_adapters_off_touches_no_statistic(family, device):
    model = make_eas(family, device, [1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.disable_adapter():
        warm_up(model, family)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- point 3: skipped means not computed -----------------------------------------------------------------------------


def count_calls(model: nn.Module) -> dict[str, int]:
    """By name as in the base model, how often each module is called from now on."""
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")

        def count(module, args, name=plain):
            calls[name] = calls.get(name, 0) + 1

        module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_skipped_means_not_computed(family, skip, merge, device, monkeypatch):
    kernels = []

    def counted(kernel):
        def count(*args, **kwargs):
            kernels.append(1)
            return kernel(*args, **kwargs)

        return count

    places = [(nn.functional, "scaled_dot_product_attention")]
    places.append((modeling_gemma2, "eager_attention_forward"))  # which caps its attention scores itself
    for module, name in places:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    model = make_eas(family, device, SKIPS[skip], "running")
    model = model.merge_and_unload() if merge else model
    calls = count_calls(model)
    kernels.clear()
    logits(model, make_inputs(family, device))
    norm, projections, ffn = PARTS.get(family, _LLAMA_PARTS)
    for layer, name in enumerate(mha_names(family)):
        expected = None if layer in SKIPS[skip] else 1
        for projection in projections:
            assert calls.get(f"{name}.{projection}") == expected
        if norm is not None and not merge:
            assert (calls.get(f"{norm.format(layer)}") or 0) >= (expected or 0)
        assert calls.get(ffn.format(layer))
    vision = LAYERS if family == "llava" else 0
    assert len(kernels) == LAYERS - len(SKIPS[skip]) + vision


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_the_norm_of_a_skipped_mha_is_not_computed(family, device):
    model = make_eas(family, device, [0, 2])
    norm = PARTS.get(family, _LLAMA_PARTS)[0]
    calls = [0] * LAYERS
    for layer in range(LAYERS):
        module = model.base_model.model.get_submodule(norm.format(layer))
        weight_owner = getattr(module, "base_layer", module)

        def count(module, args, layer=layer):
            calls[layer] += 1

        weight_owner.register_forward_pre_hook(count)
    logits(model, make_inputs(family, device))
    assert calls == [0, 1, 0, 1]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", TEXT)
def test_the_cache_is_smaller_by_the_share_of_skipped_mhas(family, skip, merge, device):
    def cache_bytes(model):
        with torch.no_grad():
            cache = model(**make_inputs(family, device), use_cache=True).past_key_values
        return sum(
            tensor.untyped_storage().nbytes()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
            if isinstance(tensor, torch.Tensor)
        )

    full = cache_bytes(build_model(family, device))
    model = make_eas(family, device, SKIPS[skip], "running")
    model = model.merge_and_unload() if merge else model
    assert full > 0
    assert cache_bytes(model) * LAYERS == full * (LAYERS - len(SKIPS[skip]))


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_a_merged_model_has_no_parameters_of_skipped_mhas(family, skip, device):
    merged = make_eas(family, device, SKIPS[skip], "running").merge_and_unload()
    names = [name for name, _ in merged.named_parameters()]
    norm, projections, _ = PARTS.get(family, _LLAMA_PARTS)
    for layer, mha in enumerate(mha_names(family)):
        has_projections = any(name.startswith(f"{mha}.{p}.") for name in names for p in projections)
        assert has_projections == (layer not in SKIPS[skip])
        if norm is not None:
            assert any(name.startswith(f"{norm.format(layer)}.") for name in names) == (layer not in SKIPS[skip])
    assert not any("eas_" in name for name in names)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_output_attentions_list_only_the_kept_layers(family, merge, device):
    model = build_model(family, device)
    model.set_attn_implementation("eager")
    model = add_eas(model, family, [0, 2], "running")
    model = model.merge_and_unload() if merge else model
    with torch.no_grad():
        output = model(**make_inputs(family, device), output_attentions=True, output_hidden_states=True)
    assert sum(attention is not None for attention in output.attentions) == 2
    assert len(output.hidden_states) == LAYERS + 1


# --- point 5: no leak ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", TEXT)
def test_an_answer_token_changes_no_logit_before_it(family, skip, training, device):
    model = make_eas(family, device, SKIPS[skip]).train(training)
    inputs = with_labels(make_inputs(family, device), answer=4)
    changed = copy.deepcopy(inputs)
    for position in range(8, 12):
        changed["input_ids"][:, position] = (inputs["input_ids"][:, position] + 7) % 59 + 1
        changed["labels"] = torch.where(inputs["labels"] == -100, -100, changed["input_ids"])
    position = 9
    later = copy.deepcopy(inputs)
    later["input_ids"][:, position:] = changed["input_ids"][:, position:]
    later["labels"][:, position:] = changed["labels"][:, position:]
    a, b = logits(model, inputs), logits(model, later)
    torch.testing.assert_close(a[:, :position], b[:, :position], rtol=1e-5, atol=1e-5)
    assert difference(a[:, position:], b[:, position:]) > 1e-3


@pytest.mark.parametrize("skip", ["half", "all"])
@pytest.mark.parametrize("family", TEXT)
def test_no_gradient_from_the_past_to_a_later_answer_token(family, skip, device):
    """The same by gradients: a logit depends on no embedding behind it."""
    model = make_eas(family, device, SKIPS[skip])
    inputs = with_labels(make_inputs(family, device), answer=4)
    seen = []

    def keep(module, args, output):
        output.requires_grad_(True)
        output.retain_grad()
        seen.append(output)

    handle = model.get_input_embeddings().register_forward_hook(keep)
    model(**inputs).logits[:, 9].square().sum().backward()
    handle.remove()
    grad = seen[0].grad.abs().sum(-1)
    assert (grad[:, 10:] == 0).all()
    assert (grad[:, 9] > 0).all()


@pytest.mark.parametrize("family", TEXT)
def test_the_prompt_does_reach_the_answer_through_the_context(family, device):
    """With everything skipped, the context is the only way from one token to another."""
    model = make_eas(family, device, SKIPS["all"])
    inputs = with_labels(make_inputs(family, device), answer=4)
    changed = copy.deepcopy(inputs)
    changed["input_ids"][:, 6] = (inputs["input_ids"][:, 6] + 7) % 59 + 1
    assert difference(logits(model, changed)[:, 9:], logits(model, inputs)[:, 9:]) > 1e-4


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(family, side, training, device):
    model = make_eas(family, device, [0, 2]).train(training)
    inputs = with_labels(make_inputs(family, device, length=12), answer=4)
    expected = logits(model, inputs)
    padded = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    pad = (3, 0) if side == "left" else (0, 3)
    for name, value in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
        padded[name] = nn.functional.pad(inputs[name], pad, value=value)
    if family == "gpt2" and side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    actual = logits(model, padded)
    actual = actual[:, 3:] if side == "left" else actual[:, :-3]
    assert difference(actual, expected) <= 1e-5


@pytest.mark.parametrize("family", ["bert"])
def test_padding_changes_nothing_in_an_encoder(family, device):
    model = make_eas(family, device, [0, 2])
    inputs = make_inputs(family, device)
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, 3), value=7),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 3)),
    }
    assert difference(logits(model, padded), logits(model, inputs)) <= 1e-5


@pytest.mark.parametrize("family", ALL)
def test_sequences_of_a_batch_do_not_see_each_other(family, device):
    model = make_eas(family, device, [0, 2])
    inputs = make_inputs(family, device, batch=3)
    together = logits(model, inputs)
    for i in range(3):
        alone = logits(model, {name: value[i : i + 1] for name, value in inputs.items()})
        assert difference(alone, together[i : i + 1]) <= 1e-5


def test_prompts_of_different_lengths_in_one_batch(device):
    """Each sequence's prompt ends where its own answer begins."""
    model = make_eas("llama", device, SKIPS["all"])
    inputs = make_inputs("llama", device)
    labels = inputs["input_ids"].clone()
    labels[0, :3], labels[1, :9] = -100, -100
    together = logits(model, {**inputs, "labels": labels})
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in {**inputs, "labels": labels}.items()}
        assert difference(logits(model, alone), together[i : i + 1]) <= 1e-5
    swapped = logits(model, {**inputs, "labels": labels.flip(0)})
    assert difference(swapped, together) > 1e-4


def test_turns_after_the_first_answer_are_no_prompt(device):
    """In a dialogue with two answers the second question comes after the first answer."""
    model = make_eas("llama", device, SKIPS["all"])
    inputs = make_inputs("llama", device)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 4:6] = inputs["input_ids"][:, 4:6]
    labels[:, 10:] = inputs["input_ids"][:, 10:]
    first_only = labels.clone()
    first_only[:, 10:] = -100
    expected = logits(model, {**inputs, "labels": labels})
    assert torch.equal(logits(model, {**inputs, "labels": first_only}), expected)
    changed = copy.deepcopy(inputs)
    changed["input_ids"][:, 8] = (changed["input_ids"][:, 8] + 3) % 59 + 1
    assert difference(logits(model, {**changed, "labels": labels})[:, :8], expected[:, :8]) <= 1e-6


def test_a_sequence_without_a_prompt_does_not_leak(device):
    model = make_eas("llama", device, SKIPS["all"])
    inputs = make_inputs("llama", device)
    labels = inputs["input_ids"].clone()
    expected = logits(model, {**inputs, "labels": labels})
    assert torch.isfinite(expected).all()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 5:] = (changed["input_ids"][:, 5:] + 3) % 59 + 1
    assert difference(logits(model, {**changed, "labels": changed["input_ids"]})[:, :5], expected[:, :5]) <= 1e-6


def test_a_mask_given_by_the_user_comes_first(device):
    model = make_eas("llama", device, [0, 2]).train()
    inputs = make_inputs("llama", device)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, :8] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = logits(model, {**inputs, "eas_prompt_mask": mask})
    assert torch.equal(given, logits(model, with_labels(inputs, answer=4)))
    assert torch.equal(given, logits(model, {**inputs, "eas_prompt_mask": mask.long()}))


def test_training_without_labels_is_warned_about(device):
    model = make_eas("llama", device, [0, 2], warm=False).train()
    inputs = make_inputs("llama", device)
    with pytest.warns(UserWarning, match=r"without labels.*eas_prompt_mask.*context='running'"):
        model(**inputs)
    model.freeze_context()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


@pytest.mark.parametrize("skip", ["half", "all"])
def test_a_causal_bert_does_not_leak_either(skip, device):
    base = build_model("bert", device, "BertLMHeadModel", is_decoder=True)
    model = add_eas(base, "bert", SKIPS[skip], task_type="CAUSAL_LM", warm=False)
    inputs = with_labels(make_inputs("bert", device), answer=4)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 10] = (changed["input_ids"][:, 10] + 3) % 59 + 1
    before, after = logits(model, inputs), logits(model, changed)
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=1e-5, atol=1e-5)
    prompt = make_inputs("bert", device)
    cached, uncached = (
        model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_an_encoder_trains_without_a_warning(family, device):
    model = make_eas(family, device, [0, 2], warm=False).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**make_inputs(family, device))


@pytest.mark.parametrize("shape", [(2, 11), (1, 12), (2, 13), (12,)])
def test_a_prompt_mask_of_another_shape(shape, device):
    model = make_eas("llama", device, [0, 2])
    with pytest.raises(ValueError, match=r"prompt mask has shape .*\(2, 12\).*eas_prompt_mask"):
        model(**make_inputs("llama", device), eas_prompt_mask=torch.ones(shape, dtype=torch.bool, device=device))


def test_sequence_classification_with_a_decoder_takes_the_whole_input(device):
    """Labels of shape (B,) tell nothing about tokens; labels of token classification are no tokens of the input."""
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    inputs = make_inputs("llama", device)
    for model_class, task, shape in (
        (LlamaForSequenceClassification, "SEQ_CLS", (2,)),
        (LlamaForTokenClassification, "TOKEN_CLS", (2, 12)),
    ):
        base = build_model("llama", device, model_class.__name__, num_labels=3, classifier_dropout=0.0)
        config = EASConfig(
            task_type=task, r=8, attention_r=4, dropout=0.0, init_weights=False,
            skipped_modules=mha_names("llama", [0]),
        )  # fmt: skip
        model = get_peft_model(base, config).train()
        labels = torch.ones(shape, dtype=torch.long, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(logits(model, {**inputs, "labels": labels}), logits(model, inputs))


# --- the running context ---------------------------------------------------------------------------------------------


def first_ffn_inputs(family, device, inputs_list, model_seed=0):
    """What enters the FFN of layer 0 of the base model without its first MHA, for each of the inputs."""
    base = without_attention(build_model(family, device, seed=model_seed), family, [0], device)
    ffn = PARTS.get(family, _LLAMA_PARTS)[2].format(0)
    seen = []
    base.get_submodule(ffn).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for inputs in inputs_list:
        logits(base, inputs)
    return seen


@pytest.mark.parametrize("family", ALL)
def test_running_context_is_the_mean_of_the_prompts_means(family, device):
    model = make_eas(family, device, [0], warm=False, init_weights=True).train()
    batches = [make_inputs(family, device, seed=seed) for seed in (5, 6, 7)]
    prompt = slice(None)
    if family in TEXT:
        batches, prompt = [with_labels(inputs, answer=4) for inputs in batches], slice(0, 8)
    for inputs in batches:
        model(**inputs)
    means = [z[:, prompt].mean((0, 1)) for z in first_ffn_inputs(family, device, batches)]
    expected = torch.stack(means).mean(0)
    (name,) = (n for n, _ in model.named_buffers() if n.endswith("eas_pia.default.running_context"))
    torch.testing.assert_close(model.get_buffer(name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_evaluation_does_not_move_the_running_context(context, device):
    model = make_eas("llama", device, [0, 2], context)
    before = {name: value.clone() for name, value in model.named_buffers()}
    logits(model, with_labels(make_inputs("llama", device)))
    model.generate(**make_inputs("llama", device), max_new_tokens=3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_frozen_context_does_not_move_in_training(device):
    model = make_eas("llama", device, [0, 2], "running").train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(**with_labels(make_inputs("llama", device))).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("family", ALL)
def test_freeze_context_makes_sequences_independent_of_their_prompts(family, device):
    model = make_eas(family, device, SKIPS["all"])
    inputs = make_inputs(family, device)
    by_prompt = logits(model, inputs)
    model.freeze_context()
    assert model.peft_config["default"].context == "running"
    frozen = logits(model, inputs)
    assert difference(frozen, by_prompt) > 1e-4
    if family in TEXT:
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        other["input_ids"][:, 0] = (inputs["input_ids"][:, 0] + 3) % 59 + 1
        assert torch.equal(logits(model, other)[:, 1:], frozen[:, 1:])


def test_freeze_context_before_any_training_is_warned_about(device):
    model = make_eas("llama", device, [0, 2], warm=False)
    with pytest.warns(UserWarning, match=r"The context is frozen, .* in no training step.*stays zero"):
        model.freeze_context()


def test_freeze_context_again_changes_nothing(device):
    model = make_eas("llama", device, [0, 2], "running")
    expected = logits(model, make_inputs("llama", device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.freeze_context()
    assert torch.equal(logits(model, make_inputs("llama", device)), expected)


def contexts_of(model, inputs) -> list[torch.Tensor]:
    """The contexts that the model's adapters are given for `inputs`."""
    seen = []
    adapters = [module for module in model.modules() if isinstance(module, RoutedAdapter)]
    handles = [one.register_forward_pre_hook(lambda module, args: seen.append(args[1])) for one in adapters]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ALL)
def test_annealing_leads_from_the_prompts_contexts_to_the_running_one(family, device):
    model = make_eas(family, device, [0, 2])
    inputs = make_inputs(family, device)
    by_prompt, expected = contexts_of(model, inputs)[0], logits(model, inputs)
    model.anneal_context(1.0)
    running, annealed_to_the_end = contexts_of(model, inputs)[0], logits(model, inputs)
    model.anneal_context(0.25)
    torch.testing.assert_close(contexts_of(model, inputs)[0], 0.75 * by_prompt + 0.25 * running)
    model.anneal_context(0.0)
    assert torch.equal(logits(model, inputs), expected)
    model.freeze_context()
    assert difference(annealed_to_the_end, logits(model, inputs)) < 1e-5
    assert difference(annealed_to_the_end, expected) > 1e-4


def test_a_running_context_that_is_not_known_yet_takes_no_share(device):
    model = make_eas("llama", device, [0, 2], warm=False)
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    model.anneal_context(0.9)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_anneals_alike(reentrant, device):
    """In both passes by the running contexts of before, though the first one moves them."""
    results = []
    for checkpointing in (False, True):
        model = make_eas("llama", device, [0, 2]).train()
        model.anneal_context(0.5)
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**with_labels(make_inputs("llama", device))).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share, device):
    with pytest.raises(ValueError, match=r"anneal_context\(.*from 0\.0 to 1\.0"):
        make_eas("llama", device, [0, 2]).anneal_context(share)


def test_the_running_context_stays_float32_in_a_half_precision_model(device):
    model = get_peft_model(
        build_model("llama", device).bfloat16(),
        EASConfig(r=8, attention_r=4, skipped_modules=mha_names("llama", [0, 2])),
        autocast_adapter_dtype=False,
    )
    buffers = [value for name, value in model.named_buffers() if name.endswith("running_context")]
    assert len(buffers) == LAYERS
    assert all(value.dtype == torch.float32 for value in buffers)
    adapters = [p for name, p in model.named_parameters() if "eas_" in name]
    assert all(parameter.dtype == torch.bfloat16 and parameter.device.type == device for parameter in adapters)
    model.train()(**with_labels(make_inputs("llama", device))).loss.backward()


# --- one path --------------------------------------------------------------------------------------------------------


def with_another_prompt(inputs):
    """Inputs whose prompt is their first token alone, if they have tokens."""
    if "input_ids" not in inputs:
        return inputs
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, 0] = True
    return {**inputs, "eas_prompt_mask": mask}


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_without_a_router_only_skipped_mhas_ask_for_the_prompt(family, device):
    """With nothing skipped, another prompt mask changes nothing and nothing is recorded; merging is exact."""
    inputs = make_inputs(family, device)
    model = make_eas(family, device, [], paths=1)
    assert not any("running_context" in name or "router" in name for name in model.state_dict())
    expected = logits(model, inputs)
    assert torch.equal(logits(model, with_another_prompt(inputs)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.freeze_context()
    assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5


@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_merging_with_one_path(family, context, device, tmp_path):
    inputs = make_inputs(family, device)
    model = make_eas(family, device, [0, 2], context, paths=1)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("up.0.weight" in name for name in names) == LAYERS
    assert sum("running_context" in name for name in names) == 2  # of the skipped MHAs
    assert not any("router" in name or "up.1" in name for name in names)
    again = PeftModel.from_pretrained(build_model(family, device), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, inputs), expected)
    merged = again.merge_and_unload(context=context)
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged").to(device).eval()
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))
    if family == "llama":
        cached, uncached = (
            loaded.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)


def test_a_kept_mha_without_a_router_takes_part_in_packed_and_chunked_generation(device):
    model = make_eas("llama", device, [], paths=1)
    inputs = make_inputs("llama", device)
    plain, chunked = (
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **o) for o in ({}, {"prefill_chunk_size": 4})
    )
    assert torch.equal(plain, chunked)


# --- no context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_without_a_context_nothing_asks_for_the_prompt(family, device, tmp_path):
    inputs = make_inputs(family, device)
    new = add_eas(build_model(family, device), family, [], "none", init_weights=True)
    assert torch.equal(logits(new, inputs), logits(build_model(family, device), inputs))
    model = make_eas(family, device, [0, 2], "none")
    parts = ("context_down", "router", "running_context", "num_contexts", "up.1")
    assert not [name for name in model.state_dict() if any(part in name for part in parts)]
    expected = logits(model, inputs)
    assert torch.equal(logits(model, with_another_prompt(inputs)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.freeze_context()
        model.train()(**inputs)  # causal, and without labels
    assert model.peft_config["default"].context == "none"
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model(family, device), tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)


def test_pia_without_its_context_by_hand(device):
    """What the FFN of a skipped MHA reads is N(x) + s U (C N(x) + c) + s β."""
    model = make_eas("llama", device, [0], "none", scale=0.5)
    layer = model.base_model.model.model.layers[0]
    seen = {}
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.update(z=output))
    layer.mlp.base_layer.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    logits(model, make_inputs("llama", device))
    pia = layer.mlp.eas_pia["default"]
    update = pia.token_down(seen["z"]) @ pia.up[0].dense_weight().T + pia.up[0].bias
    torch.testing.assert_close(seen["read"], seen["z"] + 0.5 * update)
    assert update.abs().max() > 1e-2


def test_generation_without_a_context(device):
    """Left-padded, cached and in chunks alike."""
    model = make_eas("llama", device, [0, 2], "none")
    inputs = make_inputs("llama", device)
    options = ({}, {"use_cache": False}, {"prefill_chunk_size": 4})
    outputs = [model.generate(**inputs, max_new_tokens=4, do_sample=False, **one) for one in options]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    padded = {name: nn.functional.pad(value, (3, 0)) for name, value in inputs.items()}
    assert torch.equal(model.generate(**padded, max_new_tokens=4, do_sample=False)[:, 3:], outputs[0])


# --- training --------------------------------------------------------------------------------------------------------


def loss_of(model, family, inputs):
    """A loss of the family's head."""
    output = model(**inputs)
    return output.loss if family in TEXT else output.logits.square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [*DECODERS, "bert", "vit"])
def test_gradient_checkpointing_changes_nothing(family, reentrant, device):
    results = []
    for checkpointing in (False, True):
        model = make_eas(family, device, [0, 2], warm=False)
        if checkpointing:
            model.enable_input_require_grads() if family != "vit" else None
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if family == "vit" and checkpointing and reentrant:
            # Pixels carry no gradient, so that reentrant checkpointing needs another input that does.
            model.base_model.model.vit.embeddings.register_forward_hook(lambda m, args, out: out.requires_grad_(True))
        model.train()
        inputs = make_inputs(family, device)
        inputs = with_labels(inputs) if family in TEXT else inputs
        loss = loss_of(model, family, inputs)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if "eas_" in name and p.grad is not None}
        results.append((loss.detach(), grads, dict(model.named_buffers())))
    (loss, grads, buffers), (loss_2, grads_2, buffers_2) = results
    assert torch.equal(loss, loss_2)
    assert grads.keys() == grads_2.keys()
    assert len(grads) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(grads_2[name], grad, rtol=1e-5, atol=1e-7)
    recorded = [name for name in buffers if "eas_" in name]
    assert recorded
    assert all(torch.equal(buffers[name], buffers_2[name]) for name in recorded)
    assert all(int(buffers[name]) == 1 for name in recorded if name.endswith("num_contexts"))


@pytest.mark.parametrize("family", ALL)
def test_every_used_adapter_learns_and_nothing_else_does(family, device):
    """Also through the context: its gradient reaches the layers before."""
    model = make_eas(family, device, [0, 2]).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    inputs = make_inputs(family, device)
    loss_of(model, family, with_labels(inputs) if family in TEXT else inputs).backward()
    optimizer.step()
    for name, value in model.named_parameters():
        trained = "eas_" in name or ".modules_to_save." in name
        assert torch.equal(value, before[name]) != trained, name


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_training_lowers_the_loss(context, device):
    model = make_eas("llama", device, [0, 2], context, init_weights=True, dropout=0.1).train()
    inputs = with_labels(make_inputs("llama", device, batch=4))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_training_under_autocast(family, device):
    results = {}
    for enabled in (False, True):
        model = make_eas(family, device, [0, 2], warm=False).train()
        inputs = make_inputs(family, device)
        with torch.autocast(device.partition(":")[0], dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(model, family, with_labels(inputs) if family in TEXT else inputs)
        loss.backward()
        contexts = {name: value for name, value in model.named_buffers() if name.endswith("running_context")}
        assert all(value.dtype == torch.float32 for value in contexts.values())
        results[enabled] = loss.float(), contexts
    torch.testing.assert_close(results[True][0], results[False][0], rtol=0.05, atol=0.05)
    for name, value in results[False][1].items():
        assert difference(results[True][1][name], value) < 0.05


def test_status_as_peft_reports_it(device):
    model = make_eas("llama", device, [0, 2], "running")
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.available_adapters, status.requires_grad) == (["default"], {"default": True})
    trainable, _ = model.get_nb_trainable_parameters()
    assert status.trainable_params == trainable
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_deepcopy_is_independent(device):
    model = make_eas("llama", device, [0, 2])
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    copied = copy.deepcopy(model)
    copied.freeze_context()
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "eas_" in name:
                parameter.zero_()
    assert torch.equal(logits(model, inputs), expected)
    assert model.peft_config["default"].context == "prompt"


def test_skip_set_of_a_copy_is_its_own(device):
    model = get_peft_model(build_model("llama", device), EASConfig(num_skip=2)).eval()
    copied = copy.deepcopy(model)
    copied.set_skipped_modules(mha_names("llama", [0]))
    assert model.skipped_modules == []
    inputs = make_inputs("llama", device)
    assert torch.equal(logits(model, inputs), logits(build_model("llama", device), inputs))
    assert not torch.equal(logits(copied, inputs), logits(model, inputs))


# --- the skip set ----------------------------------------------------------------------------------------------------


def searching(family, device, **options):
    """A model whose skip set is still open, as during a search."""
    model = get_peft_model(
        build_model(family, device),
        EASConfig(r=8, attention_r=4, dropout=0.0, init_weights=False, num_skip=2, **options),
    )
    warm_up(model, family)
    return model.eval()


@pytest.mark.parametrize("family", ALL)
def test_set_skipped_modules_is_the_same_as_a_fixed_set(family, device):
    model = searching(family, device)
    assert model.skipped_modules == []
    inputs = make_inputs(family, device)
    outputs = {}
    for skip, layers in SKIPS.items():
        model.set_skipped_modules(mha_names(family, layers))
        assert model.skipped_modules == mha_names(family, layers)
        outputs[skip] = logits(model, inputs)
    assert difference(outputs["first"], outputs["none"]) > 1e-3
    model.set_skipped_modules(mha_names(family, SKIPS["half"])[::-1])  # in any order
    assert torch.equal(logits(model, inputs), outputs["half"])
    assert model.skipped_modules == mha_names(family, SKIPS["half"])
    model.fix_skipped_modules(mha_names(family, SKIPS["half"]))
    assert torch.equal(logits(model, inputs), outputs["half"])


def test_set_skipped_modules_takes_any_sequence(device):
    model = searching("llama", device)
    names = mha_names("llama", [1, 3])
    for given in (tuple(names), iter(names), dict.fromkeys(names), set(names)):
        model.set_skipped_modules(given)
        assert model.skipped_modules == names


@pytest.mark.parametrize("method", ["set_skipped_modules", "fix_skipped_modules"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.9.self_attn"], r"model.layers.9.self_attn.*cannot be skipped.*andidates.*model.layers.0"),
        (["model.layers.1.self_attn", "model.layers.1.self_attn"], "more than once.*Name each once"),
        (["self_attn"], "cannot be skipped"),
        ("model.layers.1.self_attn", "list|full names|cannot be skipped"),
    ],
)
def test_names_that_are_no_candidates(method, names, message, device):
    model = searching("llama", device)
    model.set_skipped_modules(mha_names("llama", [2]))
    inputs = make_inputs("llama", device)
    expected, keys = logits(model, inputs), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(names)
    assert model.skipped_modules == mha_names("llama", [2])
    assert model.peft_config["default"].skipped_modules is None
    assert torch.equal(logits(model, inputs), expected)
    assert set(model.state_dict()) == keys


def test_fix_skipped_modules_writes_the_config_and_drops_the_rest(device):
    model = searching("llama", device)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "eas_" in name)
    model.fix_skipped_modules(mha_names("llama", [3, 1]))
    config = model.peft_config["default"]
    assert config.skipped_modules == mha_names("llama", [1, 3])
    assert config.num_skip == 2
    names = [name for name, _ in model.named_parameters() if "eas_" in name]
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if "eas_" in name) < 0.7 * count
    for layer in range(LAYERS):
        kinds = {name.split("eas_")[1].split(".")[0] for name in names if f"layers.{layer}." in name}
        assert kinds == ({"pia", "output"} if layer in (1, 3) else {"input"})


def test_after_fix_only_that_set_can_be_used(device):
    model = searching("llama", device)
    model.fix_skipped_modules(mha_names("llama", [1, 3]))
    inputs = make_inputs("llama", device)
    expected = logits(model, inputs)
    for layers in ([0, 1], [1], [1, 2, 3], []):
        with pytest.raises(ValueError, match=r"has no adapter for being (skipped|kept)"):
            model.set_skipped_modules(mha_names("llama", layers))
        assert model.skipped_modules == mha_names("llama", [1, 3])
    model.set_skipped_modules(mha_names("llama", [1, 3]))
    model.fix_skipped_modules(mha_names("llama", [1, 3]))
    assert torch.equal(logits(model, inputs), expected)


def test_a_model_without_input_adapters(device):
    config = EASConfig(r=8, attention_r=0, dropout=0.0, init_weights=False, num_skip=2)
    model = get_peft_model(build_model("llama", device), config).eval()
    inputs = make_inputs("llama", device)
    assert torch.equal(logits(model, inputs), logits(build_model("llama", device), inputs))
    model.fix_skipped_modules(mha_names("llama", [1]))
    assert not any("eas_input" in name for name in model.state_dict())


def test_gradients_flow_only_to_adapters_in_use(device):
    model = searching("llama", device).train()
    model.set_skipped_modules(mha_names("llama", [1]))
    model(**with_labels(make_inputs("llama", device))).loss.backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for layer in range(LAYERS):
        assert any(f"layers.{layer}.mlp.eas_pia" in name for name in used) == (layer == 1)
        assert any(f"layers.{layer}.self_attn.eas_input" in name for name in used) == (layer != 1)


KEPT = r".*vision_tower.*self_attn"


def test_a_kept_tower_beside_a_search(device):
    """Its adapters are trained and take their own tokens' context; its MHAs are never drawn."""
    config = EASConfig(
        num_skip=2, kept_modules=KEPT, r=8, attention_r=4, init_weights=False, task_type="CAUSAL_LM", dropout=0.0
    )
    model = get_peft_model(build_model("llava", device), config)
    names, kept = mha_names("llava"), "model.vision_tower.encoder.layers.1.self_attn"
    assert model.candidates == names
    assert "MHA never skipped" in repr(model.get_submodule(f"base_model.model.{kept}"))
    assert "MHA kept" in repr(model.get_submodule(f"base_model.model.{names[0]}"))
    inputs = with_labels(make_inputs("llava", device))
    before = logits(model.eval(), inputs)
    up = model.get_submodule(f"base_model.model.{kept}.eas_input.default.up.0")
    model.train()(**inputs).loss.backward()
    assert up.weight.grad.count_nonzero() > 0
    context = model.get_buffer(f"base_model.model.{kept}.eas_input.default.running_context")
    seen = []
    model.get_submodule(f"base_model.model.{kept}").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model.eval()(**inputs)
    torch.testing.assert_close(context, seen[0].mean((0, 1)), rtol=1e-4, atol=1e-5)
    for method in (model.set_skipped_modules, model.fix_skipped_modules):
        with pytest.raises(ValueError, match=r"vision_tower.*cannot be skipped.*candidates: model\.language"):
            method([names[0], kept])
    model.fix_skipped_modules(names[:2])
    assert sum("eas_pia" in name for name in weights_of(model)) == 2
    assert difference(logits(model.eval(), inputs), before) > 1e-3


def weights_of(model):
    """Names of the adapters' first weights."""
    return [name for name in model.state_dict() if name.endswith("token_down.weight")]


@pytest.mark.parametrize("context", ["prompt", "running", "none"])
def test_a_kept_tower_is_saved_merged_and_unloaded(context, device, tmp_path):
    inputs = make_inputs("llava", device)
    options = {"kept_modules": KEPT, "skipped_modules": mha_names("llava", [0, 2])}
    model = make_eas("llava", device, [], context, **options)
    assert len(weights_of(model)) == 2 * LAYERS
    expected = logits(model, inputs)
    plain = make_eas("llava", device, [0, 2], context)
    assert difference(logits(plain, inputs), expected) > 1e-3  # the tower's adapters matter
    model.save_pretrained(tmp_path / "adapter")
    assert (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == get_peft_model_state_dict(model).keys()
    )
    model = PeftModel.from_pretrained(build_model("llava", device), tmp_path / "adapter").eval()
    assert model.skipped_modules == mha_names("llava", [0, 2])
    assert torch.equal(logits(model, inputs), expected)
    merged = model.merge_and_unload(context="prompt" if context == "prompt" else None)
    assert difference(logits(merged, inputs), expected) <= 1e-5
    assert len(merged.config.eas["skipped"]) == 2
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged").to(device).eval()
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))
    base = PeftModel.from_pretrained(build_model("llava", device), tmp_path / "adapter").unload()
    assert torch.equal(logits(base, inputs), logits(build_model("llava", device), inputs))


def test_the_active_config(device):
    model = get_peft_model(build_model("llama", device), EASConfig(num_skip=1))
    model.add_adapter("second", EASConfig(num_skip=2))
    assert model.active_config is model.base_model.active_config is model.peft_config["default"]
    model.set_adapter("second")
    assert model.active_config is model.peft_config["second"]
    assert isinstance(model.base_model, Skippable)


def test_two_adapters_of_which_one_keeps(device):
    names = mha_names("llama")
    model = get_peft_model(build_model("llama", device), EASConfig(kept_modules=names[:1], num_skip=1))
    model.add_adapter("second", EASConfig(kept_modules=names[3:], skipped_modules=names[:1]))
    assert model.candidates == names[1:]
    model.set_adapter("second")
    assert (model.candidates, model.skipped_modules) == (names[:3], names[:1])
    model.delete_adapter("default")
    assert model.candidates == names[:3]
    model.add_adapter("default", EASConfig(num_skip=1))
    model.set_adapter("default")
    assert model.candidates == names


# --- point 9: small files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_a_file_holds_only_what_is_used(family, skip, device, tmp_path):
    """And loads again to the same model, context included."""
    model = make_eas(family, device, SKIPS[skip])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    ffn = PARTS.get(family, _LLAMA_PARTS)[2]
    outputs = {layer.candidate.name: name for name, layer in model.named_modules() if isinstance(layer, OutputLayer)}
    d, r, a = 32, 8, 4
    pia = {"context_down": r * d + r, "token_down": r * d + r, "up": 2 * (d * r // 2 + d), "router": 2 * d + 2}
    kept = {"token_down": a * d + a, "up": 2 * (d * a // 2 + d), "router": 2 * d + 2}
    statistics = {"running_context": d, "num_contexts": 1}
    for layer, mha in enumerate(mha_names(family)):
        places = {f"base_model.model.{mha}.eas_input.": {**kept, **statistics}}
        if layer in SKIPS[skip]:
            projection = model.get_submodule(outputs[mha])
            d_ffn = max(projection.base_layer.weight.shape)
            output = {"down": r * d_ffn, "up": d * r + d}
            places = {f"base_model.model.{ffn.format(layer)}.eas_pia.": {**pia, **statistics}}
            places |= {f"{outputs[mha]}.eas_output.": output}
        for prefix, expected in places.items():
            sizes: dict[str, int] = {}
            for key in [key for key in weights if key.startswith(prefix)]:
                part = key.removeprefix(prefix).split(".")[0]
                sizes[part] = sizes.get(part, 0) + weights.pop(key).numel()
            assert sizes == expected
    assert all("classifier" in key for key in weights)
    loaded = PeftModel.from_pretrained(build_model(family, device), tmp_path).eval()
    inputs = make_inputs(family, device)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    loaded.freeze_context()
    model.freeze_context()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_checkpoint_within_a_search_loads_with_the_set_in_force(family, device, tmp_path):
    model = searching(family, device)
    model.set_skipped_modules(mha_names(family, [1, 2]))
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].skipped_modules is None
    loaded = PeftModel.from_pretrained(build_model(family, device), tmp_path).eval()
    assert loaded.skipped_modules == mha_names(family, [1, 2])
    inputs = make_inputs(family, device)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_save_load_save_gives_the_same_files(context, device, tmp_path):
    model = make_eas("llama", device, [0, 3], context)
    model.save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(build_model("llama", device), tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [(tmp_path / folder / "adapter_config.json").read_text() for folder in "ab"]
    assert configs[0] == configs[1]


def test_a_loaded_adapter_trains_on(device, tmp_path):
    make_eas("llama", device, [0, 3]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_model("llama", device), tmp_path, is_trainable=True).train()
    model(**with_labels(make_inputs("llama", device))).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("eas_" in name and p.grad is not None for name, p in trainable.items())


def test_modules_to_save_are_saved(device, tmp_path):
    model = make_eas("llama", device, [0, 3], modules_to_save=["lm_head", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama", device), tmp_path).eval()
    inputs = make_inputs("llama", device)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    merged = make_eas("llama", device, [0, 3], modules_to_save=["lm_head", "embed_tokens"])
    with merged.disable_adapter():
        assert torch.equal(logits(merged, inputs), logits(build_model("llama", device), inputs))


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "vit"])
def test_several_adapters_with_different_skip_sets(family, device, tmp_path):
    inputs = make_inputs(family, device)
    expected = {}
    for name, layers, rank in (("a", [0, 1], 8), ("b", [1, 3], 4), ("c", [], 8)):
        alone = make_eas(family, device, layers, r=rank, context="prompt" if name != "b" else "running")
        expected[name] = logits(alone, inputs)
        alone.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(build_model(family, device), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.load_adapter(tmp_path / "c", adapter_name="c")
    model.eval()
    for name in ("a", "b", "c", "b", "a"):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), expected[name]), name
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), logits(build_model(family, device), inputs))
    model.set_adapter("b")
    assert model.skipped_modules == mha_names(family, [1, 3])
    model.delete_adapter("a")
    assert torch.equal(logits(model, inputs), expected["b"])
    keys = get_peft_model_state_dict(model, adapter_name="b")
    assert keys.keys() == load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
    model.set_adapter("c")
    assert torch.equal(logits(model, inputs), expected["c"])
    model.delete_adapter("c")
    model.set_adapter("b")
    assert torch.equal(logits(model, inputs), expected["b"])
    assert difference(logits(model.merge_and_unload(), inputs), expected["b"]) <= 1e-5


def test_adapters_over_different_targets(device):
    inputs = make_inputs("llama", device)
    base = logits(build_model("llama", device), inputs)
    model = add_eas(build_model("llama", device), "llama", [0], target_modules=["layers.0.self_attn"])
    first = logits(model, inputs)
    torch.manual_seed(5)
    second_config = EASConfig(
        task_type="CAUSAL_LM", r=8, attention_r=4, init_weights=False, skipped_modules=mha_names("llama", [3]),
        exclude_modules=["layers.0.self_attn"], dropout=0.0,
    )  # fmt: skip
    model.add_adapter("second", second_config)
    assert torch.equal(logits(model.eval(), inputs), first)
    assert model.candidates == mha_names("llama", [0])
    model.set_adapter("second")
    assert model.candidates == mha_names("llama", [1, 2, 3])
    assert model.skipped_modules == mha_names("llama", [3])
    assert not torch.equal(logits(model, inputs), first)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), first)
    assert torch.equal(logits(model.unload(), inputs), base)


def test_only_the_active_adapter_records_and_learns(device):
    model = make_eas("llama", device, [0], warm=False)
    model.add_adapter("other", EASConfig(task_type="CAUSAL_LM", r=8, attention_r=4, num_skip=1))
    before = {name: value.clone() for name, value in model.state_dict().items() if ".other." in name}
    warm_up(model, "llama")
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)


def test_two_active_adapters_are_refused(device):
    model = make_eas("llama", device, [0])
    model.add_adapter("other", EASConfig(task_type="CAUSAL_LM", num_skip=1))
    with pytest.raises(ValueError, match=r"one adapter at a time, but \['default', 'other'\].*Set one"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


def test_an_adapter_per_sample_is_refused(device):
    model = make_eas("llama", device, [0])
    inputs = make_inputs("llama", device)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names=.*one adapter at a time.*set_adapter\(\)"):
            call(**inputs, adapter_names=["default", "__base__"])


def test_two_models_of_one_class_do_not_share_anything(device):
    first, second = make_eas("llama", device, [0]), make_eas("llama", device, [2])
    inputs = make_inputs("llama", device)
    expected = logits(first, inputs)
    second.freeze_context()
    second.base_model.disable_adapter_layers()
    assert torch.equal(logits(first, inputs), expected)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(family, dtype, device):
    """Close to float32, and nothing in float32 where the base has none of it."""
    inputs = make_inputs(family, device)
    expected = logits(make_eas(family, device, [0, 2]), inputs)
    model = make_eas(family, device, [0, 2]).to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    actual = logits(model, inputs)
    assert actual.dtype == dtype
    assert difference(actual, expected) < (0.15 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [1], r"KV cache holds keys of layer 1, whose attention is skipped now.*new cache"),
        ([1], [], r"KV cache holds 12 tokens, but no context.*new cache"),
    ],
)
def test_a_cache_belongs_to_one_skip_set(before, after, message, device):
    """A cache filled with one skip set cannot be continued with another in silence."""
    model = searching("llama", device)
    inputs = make_inputs("llama", device)
    cache = DynamicCache(config=model.config)
    model.set_skipped_modules(mha_names("llama", before))
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        model.set_skipped_modules(mha_names("llama", after))
        mask = torch.ones(2, 13, dtype=torch.long, device=device)
        with pytest.raises(ValueError, match=message):
            model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
