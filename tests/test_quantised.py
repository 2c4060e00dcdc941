"""Quantised bases: trained on as they are; a merge quantises anew what it folds into, and nothing else.

The models are loaded as users do, by transformers; a kind whose library is absent is skipped.
"""

import warnings

import pytest
import torch
from conftest import LAYERS, add_eas, build_model, difference, logits, make_inputs, mha_names
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from training import SCHEDULE, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_eas import EASCallback, EASConfig
from peft_eas.export import to_decilm
from peft_eas.folding.fold import LowRankMap, check_projection, fold, fold_is_finite, unfold
from peft_eas.folding.quantised import dense_weight, is_quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantised anew:UserWarning"),
]

# bitsandbytes' 4-bit kernels take rows of whole blocks, 64 values each.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.1}
GPT2_SIZES = {"n_embd": 64, "n_inner": 128, "initializer_range": 0.1}
BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
KINDS = [*BITSANDBYTES, "torchao"]
# Kinds whose layers quantise their inputs as well, so that a difference in the last bit grows to one step.
ROUNDS_INPUTS = ("int8", "torchao dynamic")
SKIP = [0, 2]
TOUCHED = [
    *(f"model.layers.{i}.mlp.{name}_proj" for i in SKIP for name in ("gate", "up", "down")),
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 3) for name in "qkv"),
]


def quantisation(kind):
    """The config that quantises as `kind` says."""
    if kind in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**BITSANDBYTES[kind])
    torchao = pytest.importorskip("torchao.quantization")
    dynamic = "dynamic" in kind
    return TorchAoConfig(
        torchao.Int8DynamicActivationInt8WeightConfig() if dynamic else torchao.Int8WeightOnlyConfig()
    )


def plain_cpu(model):
    """Keeps bitsandbytes from repacking 4-bit weights for a CPU with AVX512-BF16 when they are first evaluated.

    Its way back from there loses gradients, and the order of scales that are not quantised themselves.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load(kind, folder, dtype=torch.float32):
    """The base saved in `folder`, quantised as `kind` says."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation(kind), dtype=dtype)
    return plain_cpu(model)


def make(kind, folder, skip=SKIP, context="running", dtype=torch.float32, **options):
    """EAS adapters that are no identity, on the base in `folder`, quantised."""
    return add_eas(load(kind, folder, dtype), "llama", skip, context, **options)


def bits(module):
    """Copies of all tensors in a state dict, a quantised tensor's parts one by one, by their names in the base."""
    tensors = {}
    for name, value in module.state_dict().items():
        name = name.replace(".base_layer.", ".")
        parts = {part: getattr(value, part) for part in ("qdata", "scale") if hasattr(value, part)} or {"": value}
        tensors.update({f"{name}.{part}": tensor.clone() for part, tensor in parts.items()})
    return tensors


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def dense_copy(model):
    """A float32 model with the weights that those of the quantised `model` stand for."""
    dense = build_model("llama", **SIZES)
    for name, module in model.named_modules():
        if is_quantised(module):
            dense.get_submodule(name).weight.data.copy_(dense_weight(module))
    return dense


def stock_rounding(kind, weight):
    """`weight`, (d_out, d), after the library's own quantisation of a linear layer that holds it, and back."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    if kind in BITSANDBYTES:
        library = pytest.importorskip("bitsandbytes").nn
        if kind == "int8":
            layer = library.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
        else:
            layer = library.Linear4bit(*weight.T.shape, bias=False, quant_type=kind, compress_statistics=kind == "nf4")
        layer.load_state_dict(linear.state_dict())
        return dense_weight(layer.to("cpu"))
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(linear, quantisation(kind).quant_type)
    return linear.weight.dequantize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the base model is saved."""
    path = tmp_path_factory.mktemp("base")
    build_model("llama", **SIZES).save_pretrained(path)
    return path


@pytest.fixture
def inputs():
    return make_inputs("llama", "cpu")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "torchao dynamic"])
def test_dense_weights_are_what_the_layers_compute_with(kind, folder, inputs):
    model = load(kind, folder)
    original = build_model("llama", **SIZES)
    for _ in range(2):  # before and after a forward pass, which moves things about in bitsandbytes' int8 layers
        for name in TOUCHED:
            weight, dense = original.get_submodule(name).weight, dense_weight(model.get_submodule(name))
            torch.testing.assert_close(dense, stock_rounding(kind, weight), rtol=0, atol=1e-6)
            assert difference(dense, weight) < (0.005 if "8" in kind or "torchao" in kind else 0.2)
        expected = logits(dense_copy(model), inputs)
        tolerance = 0.1 if kind in ROUNDS_INPUTS else 1e-5
        assert difference(logits(model, inputs), expected) <= tolerance


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_identity_start_and_off_means_off(kind, dtype, folder, inputs):
    base = load(kind, folder, dtype)
    expected, before = logits(base, inputs), bits(base)
    fresh = get_peft_model(base, EASConfig(r=8, attention_r=4, num_skip=2)).eval()
    assert torch.equal(logits(fresh, inputs), expected)
    model = add_eas(fresh.unload(), "llama", SKIP)
    assert difference(logits(model, inputs), expected) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert_same(bits(unloaded), before)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_a_floating_dtype(kind, autocast, folder):
    """PEFT's default is float32; without autocast it is the weights' own, where they have one."""
    config = EASConfig(r=8, attention_r=4, num_skip=2)
    model = get_peft_model(load(kind, folder, torch.bfloat16), config, autocast_adapter_dtype=autocast)
    found = {(p.dtype, p.device.type) for name, p in model.named_parameters() if ".eas_" in name}
    assert found == {(torch.bfloat16 if kind == "torchao" and not autocast else torch.float32, "cpu")}


def test_adapters_beside_float8_weights_are_not_float8():
    base = build_model("llama")
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    model = get_peft_model(base, EASConfig(r=8, attention_r=4, num_skip=2), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if ".eas_" in name} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_the_adapter_is_saved(kind, dtype, folder, inputs, tmp_path):
    base = prepare_model_for_kbit_training(load(kind, folder, dtype))
    model = get_peft_model(
        base, EASConfig(task_type="CAUSAL_LM", r=8, attention_r=4, skipped_modules=mha_names("llama", SKIP))
    )
    model.train()(**inputs)  # bitsandbytes notes the dtype of its first input
    before = {name: value for name, value in bits(model).items() if ".eas_" not in name}
    adapters = [p for name, p in model.named_parameters() if ".eas_" in name]
    assert adapters == [p for p in model.parameters() if p.requires_grad]
    labels = inputs["input_ids"].clone()
    labels[:, :8] = -100
    optimizer, losses = torch.optim.AdamW(adapters, lr=1e-2), []
    for _ in range(12):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert losses or all(p.grad is not None for p in adapters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert_same({name: value for name, value in bits(model).items() if ".eas_" not in name}, before)
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(kind, folder, dtype)), tmp_path).eval()
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_a_search_runs_under_trainer(kind, folder, inputs, tmp_path):
    base = prepare_model_for_kbit_training(load(kind, folder))
    model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4))
    make_trainer(tmp_path, EASCallback(**SCHEDULE), model).train()
    assert len(model.base_model.skipped_modules) == 2
    expected = logits(model.eval(), inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) < 0.5
    assert set(merged.config.eas["skipped"]) == {f"layers.{name.split('.')[2]}.self_attn" for name in skipped(merged)}


def skipped(merged):
    """Names of the MHAs without weights."""
    return [name for name in mha_names("llama") if not list(merged.get_submodule(name).parameters())]


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "torchao dynamic"])
def test_folded_weights_are_the_exact_ones_rounded_once(kind, dtype, folder):
    """The reference is folded in float32, from the weights that the quantised ones stand for."""
    model = make(kind, folder, dtype=dtype)
    before = bits(model.get_base_model())
    reference = add_eas(dense_copy(load(kind, folder, dtype)), "llama", SKIP, warm=False)
    state = {name: value for name, value in model.state_dict().items() if ".eas_" in name}
    reference.load_state_dict(state, strict=False)
    reference.freeze_context()
    merged, reference = model.merge_and_unload(), reference.merge_and_unload()
    for name in TOUCHED:
        actual, exact = merged.get_submodule(name), reference.get_submodule(name)
        rounded = stock_rounding(kind, exact.weight)
        bound = difference(rounded, exact.weight)
        assert 0 < difference(dense_weight(actual), exact.weight) <= 1.01 * bound
        assert difference(dense_weight(actual), rounded) <= 1e-5
        assert actual.bias.is_floating_point()
        assert difference(actual.bias, exact.bias) <= 1e-2
    after = bits(merged)
    others = [name for name in after if after[name].numel() and not name.startswith(tuple(TOUCHED))]
    assert len([name for name in others if ".down_proj." in name or ".o_proj." in name]) >= LAYERS
    assert_same({name: after[name] for name in others}, {name: before[name] for name in others})
    assert skipped(merged) == mha_names("llama", SKIP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "torchao dynamic"])
def test_merged_is_unmerged_within_the_error_of_the_quantisation(kind, dtype, folder, inputs, tmp_path):
    model = make(kind, folder, dtype=dtype)
    expected = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    error = difference(base, logits(build_model("llama", **SIZES), inputs))
    assert difference(base, expected) > 0.5
    with pytest.warns(UserWarning, match=r"quantised anew.*dequantize\(dtype="):
        merged = model.merge_and_unload(safe_merge=True)
    assert difference(logits(merged, inputs), expected) <= 2.5 * error
    merged.generate(**inputs, max_new_tokens=2)
    assert merged.config.eas["origin"]["base_parameters"] == build_model("llama", **SIZES).num_parameters()

    merged.save_pretrained(tmp_path)
    again = plain_cpu(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(again) is type(merged)
    assert again.config.quantization_config.quant_method == merged.config.quantization_config.quant_method
    assert is_quantised(again.get_submodule(TOUCHED[0]))
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_was_saved_quantised(kind, folder, inputs, tmp_path):
    load(kind, folder).save_pretrained(tmp_path / "base")
    base = plain_cpu(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    merged = add_eas(base, "llama", SKIP, "running").merge_and_unload()
    expected = logits(merged, inputs)
    assert torch.equal(expected, logits(make(kind, folder).merge_and_unload(), inputs))
    merged.save_pretrained(tmp_path / "merged")
    again = plain_cpu(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_stock_class_loads_it(kind, folder, tmp_path):
    make(kind, folder).merge_and_unload().save_pretrained(tmp_path)
    stock = LlamaConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="import peft_eas"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    for config in (stock, LlamaConfig.from_pretrained(folder, quantization_config=quantisation(kind))):
        with pytest.raises(RuntimeError, match="mismatch"):
            LlamaForCausalLM.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "sizes"), [("qwen2", SIZES), ("gpt2", GPT2_SIZES)])
def test_projections_with_a_bias_and_fused_ones(family, sizes, kind, tmp_path):
    """Qwen2's have a bias before; GPT-2's are fused, and bitsandbytes makes linear layers of them."""
    original = build_model(family, **sizes)
    original.save_pretrained(tmp_path / "base")
    inputs = make_inputs(family, "cpu")
    base = load(kind, tmp_path / "base")
    error = difference(logits(base, inputs), logits(original, inputs))
    model = add_eas(base, family, SKIP, "running")
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= max(2.5 * error, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = plain_cpu(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_and_back_bit_by_bit(kind, folder, inputs):
    model = make(kind, folder)
    expected, before = logits(model, inputs), bits(model)
    final = logits(make(kind, folder).merge_and_unload(), inputs)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(logits(model, inputs), final)
        model.unmerge_adapter()
        assert_same(bits(model), before)
        assert torch.equal(logits(model, inputs), expected)
    with model.disable_adapter():
        base = logits(model, inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.merge_adapter()
    assert torch.equal(logits(model.merge_and_unload(), inputs), final)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_is_restored_bit_by_bit(kind, tmp_path):
    build_model("qwen2", **SIZES).save_pretrained(tmp_path)
    model = add_eas(load(kind, tmp_path, torch.bfloat16), "qwen2", SKIP, "running")
    before = bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(bits(model), before)


@pytest.mark.parametrize("kind", [*KINDS, "torchao dynamic"])
def test_with_the_prompts_context_nothing_is_folded(kind, folder, inputs, tmp_path):
    model = make(kind, folder, context="prompt", dtype=torch.bfloat16, output_r=0)
    expected, before = logits(model, inputs), bits(model.get_base_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload(context="prompt", safe_merge=True)
    after = bits(merged)
    projections = [key for key in after if "_proj." in key and after[key].numel()]
    assert len({key.partition("_proj")[0] for key in projections}) == 2 * 4 + 3 * LAYERS
    assert_same({key: after[key] for key in projections}, {key: before[key] for key in projections})
    assert {p.dtype for name, p in merged.named_parameters() if "eas_adapter" in name} == {torch.bfloat16}
    assert skipped(merged) == mha_names("llama", SKIP)
    assert difference(logits(merged, inputs), expected) <= 0.1
    merged.save_pretrained(tmp_path)
    again = plain_cpu(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "torchao"])
def test_with_the_prompts_context_the_merge_is_exact(kind, folder, inputs):
    model = make(kind, folder, context="prompt", output_r=0)
    expected = logits(model, inputs)
    assert difference(logits(model.merge_and_unload(context="prompt"), inputs), expected) <= 1e-5


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_dequantised_by_transformers_the_merge_is_exact(kind, folder, inputs, tmp_path):
    model = make(kind, folder)
    quantised = logits(model, inputs)
    model.get_base_model().dequantize(dtype=torch.float32)
    expected = logits(model, inputs)
    assert difference(expected, quantised) <= (0.1 if kind == "int8" else 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(m) for m in again.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize(("value", "kinds"), [(float("nan"), KINDS), (1e6, ["int8"])])
def test_safe_merge(value, kinds, method, folder):
    """Beyond float16 as well, from which bitsandbytes makes its int8."""
    for kind in kinds:
        model = make(kind, folder)
        with torch.no_grad():
            model.get_submodule("base_model.model.model.layers.3.self_attn").adapters["default"].up[0].weight.fill_(
                value
            )
        before = bits(model)
        with pytest.raises(ValueError, match=r"NaN or infinity into model.layers.3.self_attn.*Nothing was changed"):
            getattr(model, method)(safe_merge=True)
        after = bits(model)
        assert all(torch.equal(after[key], before[key]) for key in before if ".eas_" not in key)


def test_what_cannot_be_quantised_again_is_refused():
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    projections = [linear]
    library = pytest.importorskip("bitsandbytes")
    projections.append(library.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    projections.append(library.nn.Linear4bit(64, 64))  # not quantised before it is moved
    torchao = pytest.importorskip("torchao.quantization")
    projections.append(nn.Linear(64, 64))
    torchao.quantize_(projections[-1], torchao.IntxWeightOnlyConfig())
    projections.append(nn.Linear(64, 64))
    torchao.quantize_(projections[-1], torchao.Int8WeightOnlyConfig())
    projections[-1].weight.act_pre_scale = torch.ones(64)
    for projection in projections:
        kind = type(projection.weight).__name__
        with pytest.raises(TypeError, match=rf"into a.b: its weight is quantised .*{kind} of.*float32, float16 or"):
            check_projection(projection, "a.b")


@pytest.mark.parametrize("where", ["model.layers.3.self_attn.v_proj", "model.layers.2.mlp.up_proj"])
def test_one_refused_projection_keeps_all_as_they_are(where, folder):
    base = load("torchao", folder)
    base.get_submodule(where).weight.act_pre_scale = torch.ones(SIZES["hidden_size"])
    model = add_eas(base, "llama", SKIP, "running")
    before = bits(model)
    for method in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(TypeError, match=rf"into {where}.*Int8Tensor.*float32, float16 or bfloat16"):
            getattr(model, method)()
        assert_same(bits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_says_what_to_do(kind, folder, tmp_path):
    merged = make(kind, folder, skip=[1, 2]).merge_and_unload()
    with pytest.raises(ValueError, match=r"some are .*[Ii]nt8.*dequantize\(\)"):
        to_decilm(merged, tmp_path)
    if kind in BITSANDBYTES:
        to_decilm(merged.dequantize(dtype=torch.float32), tmp_path)


# --- 4-bit weights that evaluation on a CPU has repacked -------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_repacked_weights_are_read_and_restored(quant_type, nested):
    library = pytest.importorskip("bitsandbytes")
    if not library.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only")
    torch.manual_seed(0)
    projection = library.nn.Linear4bit(128, 64, quant_type=quant_type, compress_statistics=nested)
    projection = projection.to("cpu").eval()
    expected = dense_weight(projection)
    x = torch.randn(3, 128)
    with torch.no_grad():
        projection(x)
    assert projection.weight.quant_state.packing_format_for_cpu
    assert difference(dense_weight(projection), expected) <= 2**-8  # its scales are bfloat16 now
    update = LowRankMap(0.1 * torch.randn(128, 4), torch.randn(4, 128), torch.randn(128))
    exact = expected + expected @ update.left @ update.right
    assert fold_is_finite(projection, update)
    with torch.no_grad():
        before = projection(x)
        record = fold(projection, update)
        assert difference(dense_weight(projection), exact) <= 0.25
        assert difference(projection(x), nn.functional.linear(x, exact, projection.bias)) <= 0.25
        unfold(projection, record)
        assert torch.equal(projection(x), before)
