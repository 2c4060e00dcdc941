"""What does not fit gets an error with what was received, what is allowed and what to do; nothing is half-applied.

Bad values of the config are in test_config.py, those of `EASCallback` in test_callback.py.
"""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_eas import ARCHITECTURES, EASConfig

FAMILIES = ["llama", "gpt2", "bert"]


# transformers reads weights on its own, and only reports what is amiss with them; configs pass through PEFT.
ALL_ROUTES = ("new", "second", "transformers")


@pytest.fixture
def folder(tmp_path, device):
    """Folder of a sound adapter for the tiny llama, with the MHAs of layers 0 and 2 skipped."""
    make_eas("llama", device, [0, 2]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


class Unchanged:
    """Asserts at the end that a model is what it was: outputs, modules, trainable parameters, hooks."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self.model = model
        self.inputs = make_inputs(family, next(model.parameters()).device)
        self.before = self._look()

    def _look(self):
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        modules = [(name, type(module)) for name, module in self.model.named_modules()]
        hooks = [len(module._forward_pre_hooks) for module in self.model.modules()]
        return trainable, modules, hooks, {k: v.clone() for k, v in self.model.state_dict().items()}

    def __enter__(self):
        self.model.eval()
        self.expected = logits(self.model, self.inputs)
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        after = self._look()
        assert after[:3] == self.before[:3]
        assert after[3].keys() == self.before[3].keys()
        assert all(torch.equal(value, self.before[3][name]) for name, value in after[3].items())
        assert torch.equal(logits(self.model, self.inputs), self.expected)


def files_of(folder):
    """Contents of all files."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _load(route, model, folder):
    if route == "new":
        PeftModel.from_pretrained(model, folder)
    elif route == "second":
        model.load_adapter(folder, adapter_name="second")
    else:
        model.load_adapter(str(folder))


def refuse_to_load(folder, message, device, family="llama", routes=("new", "second"), error=ValueError, **changes):
    """Asserts that the adapter in `folder` is refused for a new model, which stays as it was, as do the files."""
    for load in routes:
        model = build_model(family, device, **changes)
        files = files_of(folder)
        if load == "second":  # beside an adapter that is there already
            model = add_eas(model, family, [1])
        with Unchanged(model, family), pytest.raises(error, match=message):
            _load(load, model, folder)
        if load == "second":
            assert list(model.peft_config) == ["default"]
            assert model.active_adapters == ["default"]
        assert files_of(folder) == files


# --- an adapter made for another base --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAYERS - 2, LAYERS + 1])
def test_another_number_of_layers(layers, folder, device):
    message = r"made for a base model with .*'num_mhas': 4.*this one has .*'num_mhas': \d.*Load it on"
    if layers < LAYERS:
        message += r"|target_modules|skipped_modules names"
    refuse_to_load(folder, message, device, routes=ALL_ROUTES, num_hidden_layers=layers)


def test_another_width(folder, device):
    message = r"made for a base model with .*32.*this one has .*64.*Load it on"
    refuse_to_load(folder, message, device, routes=ALL_ROUTES, hidden_size=64, head_dim=16)


def test_another_family(folder, device):
    refuse_to_load(folder, r"target_modules=.*matches no.*transformer.h.0.attn", device, "gpt2", routes=ALL_ROUTES)


def test_an_adapter_of_a_smaller_model_by_suffix(device, tmp_path):
    """Suffix targets match in any number of layers, so that only the recorded shape tells."""
    model = build_model("llama", device, num_hidden_layers=2)
    options = {"target_modules": ["self_attn"], "skipped_modules": mha_names("llama", [1])}
    add_eas(model, "llama", [], **options).save_pretrained(tmp_path)
    refuse_to_load(tmp_path, r"made for a base model with .*'num_mhas': 2", device, routes=ALL_ROUTES)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file(share, folder, device):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refuse_to_load(folder, r"adapter_model.safetensors cannot be read.*truncated.*again", device)


def test_not_a_safetensors_file(folder, device):
    (folder / "adapter_model.safetensors").write_text("<html>404: not found</html>")
    refuse_to_load(folder, r"adapter_model.safetensors cannot be read.*not a safetensors file", device)


def test_a_foreign_file(folder, device, tmp_path):
    lora = get_peft_model(build_model("llama", device), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / "adapter_model.safetensors", folder)
    refuse_to_load(folder, r"holds no EAS adapter.*lora_A", device)


def test_an_empty_file(folder, device):
    save_file({}, folder / "adapter_model.safetensors")
    refuse_to_load(folder, r"holds no EAS adapter.*no tensor at all", device)


def change_file(folder, change):
    """Rewrites the adapter's weights by `change`, from a dictionary to a dictionary."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_file_with_a_tensor_missing(folder, device):
    def change(weights):
        return {key: value for key, value in weights.items() if not key.endswith("layers.2.mlp.eas_pia.up.1.weight")}

    change_file(folder, change)
    refuse_to_load(folder, r"do not fit.*layers\.2\.mlp.*missing.*adapter_config.json", device)


@pytest.mark.parametrize("part", ["layers.2.mlp.eas_pia.", "layers.1.self_attn.eas_input."])
def test_a_file_with_a_whole_adapter_missing(part, folder, device):
    """Its weights would stay at what they were drawn."""
    change_file(folder, lambda weights: {key: value for key, value in weights.items() if part not in key})
    refuse_to_load(folder, rf"do not fit.*{part.split('.eas_')[0]}.*missing", device)


def test_a_file_with_tensors_of_another_shape(folder, device):
    def change(weights):
        return {key: value[..., :1].contiguous() if "up.0.weight" in key else value for key, value in weights.items()}

    change_file(folder, change)
    refuse_to_load(folder, r"do not fit.*up.*shape \(32, 1\) instead of \(32, \d\)", device)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("", torch.int32), ("", torch.bool), ("", torch.complex64), ("layers.2.mlp.eas_pia.router", torch.int8)],
)
def test_a_file_with_tensors_of_another_kind(part, dtype, folder, device):
    change_file(folder, lambda weights: {key: v.to(dtype) if part in key else v for key, v in weights.items()})
    refuse_to_load(folder, rf"adapter_model.safetensors holds .*{part}.*no floating-point tensor.*own file", device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.removeprefix("base_model.model."), r"do not start with 'base_model.model.'.*model.layers.0"),
        (lambda key: f"model.{key}", r"do not start with 'base_model.model.', such as model.base_model"),
        (
            lambda key: key.replace("layers.2.mlp", "layers.2.ffn"),
            r"do not fit.*layers\.2\.(ffn.*no place|mlp.*missing)",
        ),
        (
            lambda key: key.replace("token_down", "tokens"),
            r"do not fit.*(eas_pia.tokens.*no place|token_down.*missing)",
        ),
        (lambda key: key.replace("up.1", "up.2"), r"do not fit.*(up\.2.*no place|up\.1.*missing)"),
        (lambda key: key.replace("eas_pia", "eas_adapter"), r"do not fit.*(no place|missing)"),
    ],
)
def test_a_file_with_other_names(change, message, folder, device):
    change_file(folder, lambda weights: {change(key): value for key, value in weights.items()})
    refuse_to_load(folder, message, device)


@pytest.mark.parametrize("name", ["layers.2.mlp.eas_pia.extra", "layers.2.mlp.eas_pia.up.2.weight", "norm.eas_pia.a"])
def test_a_file_with_weights_that_have_no_place(name, folder, device):
    """A newer version's, say, which would not compute the same without them."""
    change_file(folder, lambda weights: {**weights, f"base_model.model.model.{name}": torch.zeros(2)})
    refuse_to_load(folder, rf"do not fit.*{name.rpartition('.')[0]}.*no place in the model", device)


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "foreign", "no tensors", "integers", "names"])
def test_a_pickled_file(kind, folder, device):
    path = folder / "adapter_model.bin"
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {
            "foreign": {"base_model.model.lm_head.lora_A.weight": torch.zeros(2)},
            "no tensors": {"a": 1},
            "integers": {key: value.int() for key, value in weights.items()},
            "names": {key.removeprefix("base_model."): value for key, value in weights.items()},
        }.get(kind, weights),
        path,
    )
    if kind in ("empty", "garbage", "truncated"):
        path.write_bytes({"empty": b"", "garbage": b"<html>", "truncated": path.read_bytes()[:2000]}[kind])
    message = {
        "foreign": r"holds no EAS adapter.*lora_A",
        "no tensors": r"holds no EAS adapter.*it holds a\)",
        "integers": r"no floating-point tensor",
        "names": r"do not start with 'base_model.model.'",
    }.get(kind, r"adapter_model.bin cannot be read \((.|\n)*truncated.*Copy or download")
    refuse_to_load(folder, message, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_in_another_precision_is_accepted(dtype, folder, device):
    change_file(folder, lambda weights: {key: value.to(dtype) for key, value in weights.items()})
    model = PeftModel.from_pretrained(build_model("llama", device), folder)
    assert model.skipped_modules == mha_names("llama", [0, 2])


def test_a_file_of_another_rank(folder, device, tmp_path):
    make_eas("llama", device, [0, 2], r=16).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", folder)
    refuse_to_load(folder, r"do not fit.*shape .* instead of", device)


def test_a_file_of_another_skip_set(folder, device, tmp_path):
    make_eas("llama", device, [1, 2]).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", folder)
    refuse_to_load(folder, r"do not fit.*layers\.[01]\.", device)


def test_a_file_of_a_larger_model(folder, device, tmp_path):
    """With its config lost, say, and another put in its place."""
    other = build_model("llama", device, num_hidden_layers=6)
    options = {"skipped_modules": [*mha_names("llama", [0, 2]), "model.layers.5.self_attn"]}
    add_eas(other, "llama", [], **options).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", folder)
    refuse_to_load(folder, r"do not fit.*layers\.[45]\.", device)


def change_config(folder, **changes):
    """Rewrites fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": -8}, r"r must be an integer of at least 1"),
        ({"r": 16}, r"do not fit.*shape .* instead of"),
        ({"groups": 1}, r"do not fit.*shape .* instead of"),
        ({"groups": 3}, r"multiple of groups=3"),
        ({"paths": 0}, r"paths must be an integer of at least 1"),
        ({"paths": 1}, r"do not fit.*no place in the model"),
        ({"paths": 3}, r"do not fit.*(is missing|shape .* instead of)"),
        ({"skipped_modules": mha_names("llama", [1, 3])}, r"do not fit"),
        ({"skipped_modules": ["model.layers.7.self_attn"]}, r"layers\.7.*cannot be skipped"),
        ({"num_skip": 3}, r"num_skip=3 contradicts skipped_modules"),
        ({"attention_r": 0}, r"do not fit.*self_attn"),
        ({"context": "image"}, r"context must be 'prompt', 'running' or 'none'"),
        ({"context": "none"}, r"do not fit.*no place in the model"),
    ],
)
def test_a_config_that_was_changed_by_hand(changes, message, folder, device):
    change_config(folder, **changes)
    refuse_to_load(folder, message, device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "8"}, r"r='8'\): r must be an integer of at least 1"),
        ({"r": 8.0}, r"r=8\.0\): r must be an integer"),
        ({"dropout": "0.1"}, r"dropout='0\.1'\): dropout must be in \[0, 1\)"),
        ({"init_weights": "no"}, r"init_weights='no'\): init_weights must be True or False"),
        ({"scores": {"a": float("nan")}}, r"scores=.*must be a dict from names of MHAs to finite numbers"),
        ({"scores": [0.5]}, r"scores=\[0\.5\]\): scores must be a dict"),
        ({"base_shape": [4, 32]}, r"base_shape=\[4, 32\]\): base_shape must be a dict, or None"),
        (
            {"base_shape": {"num_mhas": 4}},
            r"made for a base model with \{'num_mhas': 4\}, but this one has .*Load it on",
        ),
        (
            {"target_modules": "model.layers.[0-3"},
            r"regular expression .*does not compile \(unterminated.*give a list",
        ),
        ({"target_modules": 4}, r"target_modules=4\): target_modules must be a list of names"),
        ({"exclude_modules": "*"}, r"exclude_modules='\*'\): .*does not compile \(nothing to repeat"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head'\): modules_to_save must be a list of names"),
        ({"skipped_modules": "model.layers.0.self_attn"}, r"skipped_modules=.*: give a list of full module names"),
        ({"skipped_modules": [], "num_skip": None}, r"do not fit.*layers\.0\.self_attn.*missing"),
    ],
)
def test_a_config_with_values_of_another_type(changes, message, folder, device):
    change_config(folder, **changes)
    refuse_to_load(folder, message, device)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", json.JSONDecodeError, "Expecting value: line 1 column 1"),
        ('{"peft_type": "EAS", "r":', json.JSONDecodeError, "Expecting value: line 1"),
        ("<html>", json.JSONDecodeError, "Expecting value"),
        ("{}", KeyError, "peft_type"),
        ('{"peft_type": null}', KeyError, "None"),
        ('{"peft_type": "EAS2"}', KeyError, "EAS2"),
        ("[]", TypeError, "list indices"),
    ],
)
def test_a_config_that_is_broken(text, error, message, folder, device):
    """PEFT reads it first, to find out the method, so that the errors are its own."""
    (folder / "adapter_config.json").write_text(text)
    refuse_to_load(folder, message, device, error=error)


def test_another_methods_adapter_beside_one_of_eas(device, tmp_path):
    get_peft_model(build_model("llama", device), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    refuse_to_load(tmp_path, r"different peft types.*EAS.*LORA", device, routes=("second",))


def test_another_methods_config(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter of the method .*LORA, not of EAS.*PeftConfig"):
        EASConfig.from_pretrained(str(tmp_path))


def test_a_config_from_the_future(folder, device):
    """Fields that are not known are left out, and a warning says so."""
    expected = logits(PeftModel.from_pretrained(build_model("llama", device), folder), make_inputs("llama", device))
    change_config(folder, new_field=3, peft_version="99.0")
    with pytest.warns(UserWarning, match="new_field"):
        model = PeftModel.from_pretrained(build_model("llama", device), folder)
    assert torch.equal(logits(model, make_inputs("llama", device)), expected)


def test_saving_refuses_nothing_that_loading_accepts(folder, device):
    model = PeftModel.from_pretrained(build_model("llama", device), folder)
    model.save_pretrained(folder)
    PeftModel.from_pretrained(build_model("llama", device), folder)


# --- names -----------------------------------------------------------------------------------------------------------

NO_LIST = "Give a list of full names of candidates: model.layers.0.self_attn"
NO_CANDIDATE = r"cannot be skipped\. Use full names of candidates: model.layers.0.self_attn"
BAD_NAMES = [
    ("model.layers.0.self_attn", NO_LIST),
    (b"model.layers.0.self_attn", NO_LIST),
    (None, NO_LIST),
    (3, NO_LIST),
    ([3], NO_LIST),
    ([None], NO_LIST),
    ([["model.layers.0.self_attn"]], NO_LIST),
    ([""], rf"names '', which {NO_CANDIDATE}"),
    (["model.layers.0.self_attn "], rf"names 'model.layers.0.self_attn ', which {NO_CANDIDATE}"),
    (["model.layers.0.mlp"], rf"names 'model.layers.0.mlp', which {NO_CANDIDATE}"),
    (["слой.0"], rf"names 'слой.0', which {NO_CANDIDATE}"),
    (["model.layers.*.self_attn"], rf"names 'model.layers.\*.self_attn', which {NO_CANDIDATE}"),
    (mha_names("llama", [1, 3, 1]), r"names an MHA more than once: .*Name each once"),
]


@pytest.mark.parametrize(("names", "message"), BAD_NAMES)
@pytest.mark.parametrize("method", ["set_skipped_modules", "fix_skipped_modules"])
def test_skip_sets_that_are_none(method, names, message, device):
    model = make_eas("llama", device, [], num_skip=2, skipped_modules=None)
    model.set_skipped_modules(mha_names("llama", [1, 2]))
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
        getattr(model, method)(names)
    assert model.skipped_modules == mha_names("llama", [1, 2])
    assert model.peft_config["default"].skipped_modules is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": []}, r"target_modules=set\(\) matches nothing.*leave target_modules out"),
        ({"target_modules": "all-linear"}, r"target_modules='all-linear' matches nothing.*model.layers.0.self_attn"),
        ({"target_modules": ["слой"]}, r"target_modules=\{'слой'\} matches nothing.*model.layers.0.self_attn"),
        ({"target_modules": ["mlp"]}, r"matches model.layers.0.mlp, .*which cannot be skipped"),
        ({"exclude_modules": ["mlp"]}, r"exclude_modules=\{'mlp'\}: 'mlp' matches nothing that could be skipped"),
        ({"exclude_modules": ["слой"]}, r"'слой' matches nothing that could be skipped"),
        ({"modules_to_save": ["голова"]}, r"'голова' is no module of LlamaForCausalLM.*model.named_modules\(\)"),
        ({"skipped_modules": ["слой.0"]}, rf"names 'слой.0', which {NO_CANDIDATE}"),
        ({"skipped_modules": ["model.layers.0.mlp"]}, rf"names 'model.layers.0.mlp', which {NO_CANDIDATE}"),
        ({"groups": 3, "r": 6, "attention_r": 6}, r"groups=3 does not divide the model's width, 32. Choose a divisor"),
    ],
)
@pytest.mark.parametrize("place", ["new", "second"])
def test_configs_that_do_not_fit_the_model(place, fields, message, device):
    model = build_model("llama", device) if place == "new" else make_eas("llama", device, [1])
    config = EASConfig(task_type="CAUSAL_LM", **fields)
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
        get_peft_model(model, config) if place == "new" else model.add_adapter("second", config)
    if place == "second":
        assert list(model.peft_config) == model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["a.b", "", "keys", "training"])
@pytest.mark.parametrize("place", ["new", "second"])
def test_names_that_no_adapter_can_have(place, name, device):
    model = build_model("llama", device) if place == "new" else make_eas("llama", device, [1])
    config = EASConfig(task_type="CAUSAL_LM", num_skip=1)
    message = rf"adapter_name={name!r} was received. Choose a name without dots .*such as 'default'"
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
        get_peft_model(model, config, adapter_name=name) if place == "new" else model.add_adapter(name, config)
    if place == "second":
        assert list(model.peft_config) == model.active_adapters == ["default"]


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mha_projections": ("self_attn.qkv",)}, r"names 'self_attn.qkv', but model.layers.0 has no such module"),
        (
            {"ffn_projections": ("mlp.up",)},
            r"names 'mlp.up', but model.layers.0 has no such module. Set ARCHITECTURES",
        ),
        ({"mha": "attn", "mha_projections": ("attn.q_proj",)}, r"names 'attn', but model.layers.0 has no such module"),
        ({"ffn": "ffn", "ffn_projections": ("ffn.up",), "branch": None}, r"names 'ffn', but .* no such module"),
        ({"input_norm": "norm1"}, r"names 'norm1', but model.layers.0 has no such module"),
        ({"output_norm": "norm2"}, r"names 'norm2', but model.layers.0 has no such module"),
        ({"kept_norm": "self_attn.norm"}, r"names 'self_attn.norm', but model.layers.0 has no such module"),
        ({"core": "self_attn.core"}, r"names 'self_attn.core', but model.layers.0 has no such module"),
        ({"branch": ("norm3", "mlp")}, r"names 'norm3', but model.layers.0 has no such module"),
        ({"ffn_projections": ("mlp.act_fn",)}, r"'mlp.act_fn' as a projection, but it is a SiLUActivation.*no weight"),
        ({"ffn_projections": ("mlp.down_proj",)}, r"inputs of different widths .*'mlp.down_proj': 48.*one width"),
    ],
)
@pytest.mark.parametrize("place", ["new", "second"])
def test_a_row_that_does_not_fit_its_block(place, changes, message, device, monkeypatch):
    model = build_model("llama", device) if place == "new" else make_eas("llama", device, [1])
    row = replace(ARCHITECTURES["LlamaDecoderLayer"], **changes)
    monkeypatch.setitem(ARCHITECTURES, "LlamaDecoderLayer", row)
    config = EASConfig(task_type="CAUSAL_LM", num_skip=1)
    message = rf"The row of LlamaDecoderLayer in the table of architectures .*{message}"
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
        get_peft_model(model, config) if place == "new" else model.add_adapter("second", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "text"}, r"kind='text'\): kind must be one of 'decoder', 'encoder', 'vision'"),
        (
            {"mha_projections": "self_attn.q_proj"},
            r"mha_projections='.*must be a tuple of paths of modules in 'self_attn'",
        ),
        ({"mha_projections": ()}, r"mha_projections=\(\)\): .*such as \('self_attn.in_proj',\)"),
        ({"mha_projections": ("mlp.up_proj",)}, r"must be a tuple of paths of modules in 'self_attn'"),
        ({"ffn_projections": (3,)}, r"ffn_projections=\(3,\)\): ffn_projections must be a tuple of paths"),
        ({"ffn_projections": ("up_proj",)}, r"must be a tuple of paths of modules in 'mlp', such as"),
        ({"branch": ("post_attention_layernorm",)}, r"branch=.* does not contain ffn='mlp'. Name the FFN"),
    ],
)
def test_rows_that_no_block_could_have(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ARCHITECTURES["LlamaDecoderLayer"], **changes)


@pytest.mark.parametrize("rows", [{"mha": "self_attn"}, ("self_attn", "mlp")])
def test_what_is_no_row(rows, device, monkeypatch):
    model = build_model("llama", device)
    monkeypatch.setitem(ARCHITECTURES, "LlamaDecoderLayer", rows)
    with (
        Unchanged(model, "llama"),
        pytest.raises(TypeError, match=r"ARCHITECTURES\['LlamaDecoderLayer'\] holds .*several"),
    ):
        get_peft_model(model, EASConfig(num_skip=1))


class Flattened(nn.Module):
    """An FFN whose inner part is given (batch · tokens, width), as those of mixtures of experts are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.reshape(-1, x.shape[-1])).view(x.shape)


def llama_with(ffn: type[nn.Module], device: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A Llama whose FFNs stand inside an `ffn`, and the table's row for its blocks."""
    base = build_model("llama", device)
    for block in base.model.layers:
        block.mlp = ffn(block.mlp)
    projections = ("mlp.inner.gate_proj", "mlp.inner.up_proj")
    paths = {"ffn": "mlp.inner", "ffn_projections": projections, "output_projection": "mlp.inner.down_proj"}
    row = replace(ARCHITECTURES["LlamaDecoderLayer"], **paths, branch=None)
    monkeypatch.setitem(ARCHITECTURES, "LlamaDecoderLayer", row)
    return base


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_an_ffn_that_flattens_its_tokens_is_as_good_as_one_that_does_not(context, device, monkeypatch):
    inputs = make_inputs("llama", device)
    expected = logits(make_eas("llama", device, [0, 2], context), inputs)
    base = llama_with(Flattened, device, monkeypatch)
    assert difference(logits(add_eas(base, "llama", [0, 2], context), inputs), expected) <= 1e-5


class OnePart(Flattened):
    """An FFN whose inner part is given some of the tokens, as one of several experts is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return torch.cat([self.inner(tokens[1:]), tokens[:1]]).view(x.shape)


@pytest.mark.parametrize("context", ["prompt", "running"])
def test_an_ffn_that_is_given_some_of_the_tokens(context, device, monkeypatch):
    base = llama_with(OnePart, device, monkeypatch)
    model = add_eas(base, "llama", [], context, num_skip=1, skipped_modules=None, warm=False)
    with Unchanged(model, "llama"):
        model.set_skipped_modules(mha_names("llama", [1]))
        message = (
            r"was given 23 tokens \(.*\(23, 32\)\), but the attention .* 24, in 2 sequences.*set `ffn` to the module"
        )
        with pytest.raises(ValueError, match=message):
            logits(model, make_inputs("llama", device))
        model.set_skipped_modules([])


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(("family", "kind"), [("bert", "encoder"), ("vit", "vision")])
def test_a_task_that_the_model_is_not_for(family, kind, task_type, device):
    model = build_model(family, device)
    message = (
        rf"task_type='{task_type}' is for models that generate text, but {type(model).__name__} .*{kind}.*'SEQ_CLS'"
    )
    with Unchanged(model, family), pytest.raises(ValueError, match=message):
        get_peft_model(model, EASConfig(task_type=task_type, num_skip=1))
    get_peft_model(model, EASConfig(num_skip=1))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_in_the_place_of_a_language_models(family, task_type, device):
    model = build_model(family, device)
    message = rf"task_type='{task_type}' trains a head called .*, but {type(model).__name__} has none, and a language"
    with Unchanged(model, family), pytest.raises(ValueError, match=message):
        get_peft_model(model, EASConfig(task_type=task_type, num_skip=1))


@pytest.mark.parametrize(
    ("context", "fields", "message"),
    [
        (
            "running",
            {"skipped_modules": mha_names("llama", [0])},
            r"names 'model.layers.0.self_attn', which .*: model.layers.1",
        ),
        (
            "running",
            {"target_modules": mha_names("llama", [0, 1])},
            r"matches model.layers.0.self_attn, which cannot be skipped",
        ),
        ("running", {"num_skip": 3}, r"num_skip=3, but this model has 2 MHAs that may be skipped .*0 to 2"),
        (
            "prompt",
            {"num_skip": 1},
            r"was merged with context='prompt' and still has its adapters.*freeze_context\(\)",
        ),
    ],
)
def test_a_base_that_is_merged_already(context, fields, message, device):
    model = make_eas("llama", device, [0, 2], context)
    merged = model.merge_and_unload(context=None if context == "running" else "prompt")
    with Unchanged(merged, "llama"), pytest.raises(ValueError, match=message):
        get_peft_model(merged, EASConfig(task_type="CAUSAL_LM", **fields))


def test_an_adapter_for_the_model_before_its_merge(folder, device):
    merged = make_eas("llama", device, [0, 2], "running").merge_and_unload()
    files = files_of(folder)
    with (
        Unchanged(merged, "llama"),
        pytest.raises(ValueError, match=r"for a model before its merge, .*is a merged one"),
    ):
        PeftModel.from_pretrained(merged, folder)
    assert files_of(folder) == files


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            [[True] * 12] * 2,
            r"eas_prompt_mask of type list was received. Pass a boolean tensor of the shape of input_ids",
        ),
        ("all", r"eas_prompt_mask of type str was received"),
        (torch.ones(2, 3), r"prompt mask has shape \(2, 3\), but the layer computes \(2, 12\)"),
    ],
)
def test_prompt_masks_that_are_none(mask, message, device):
    model = make_eas("llama", device, [0, 2])
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
        model(**make_inputs("llama", device), eas_prompt_mask=mask)


# --- loading weights into a model that has the adapter ---------------------------------------------------------------


def test_weights_that_do_not_fit_leave_a_trained_model_alone(device, tmp_path):
    make_eas("llama", device, [0, 2], r=16).save_pretrained(tmp_path)
    model = make_eas("llama", device, [0, 2])
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=r"do not fit.*shape"):
        model.load_adapter(tmp_path, adapter_name="default")


def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone(device):
    model = make_eas("llama", device, [0, 2])
    for config, message in (
        (EASConfig(task_type="CAUSAL_LM", num_skip=9), "num_skip=9"),
        (EASConfig(task_type="CAUSAL_LM", skipped_modules=["nonsense"]), "nonsense"),
        (EASConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), "lm_head"),
    ):
        with Unchanged(model, "llama"), pytest.raises(ValueError, match=message):
            model.add_adapter("second", config)
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]
    model.add_adapter("second", EASConfig(task_type="CAUSAL_LM", num_skip=1))  # the name is still free
    assert list(model.peft_config) == ["default", "second"]


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_twice(family, device):
    model = make_eas(family, device, [0, 2], "running")
    merged = model.merge_and_unload()
    with Unchanged(merged, family), pytest.raises(ValueError, match=r"unloaded already.*first call returned"):
        model.merge_and_unload()
    with Unchanged(merged, family), pytest.raises(ValueError, match=r"merged or unloaded already"):
        model.unload()
    for call in (model.merge_adapter, lambda: model.set_skipped_modules([]), lambda: model.fix_skipped_modules([])):
        with Unchanged(merged, family), pytest.raises(ValueError, match=r"merged or unloaded already"):
            call()
    with Unchanged(merged, family):
        model.unmerge_adapter()


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_twice(family, device):
    model = make_eas(family, device, [0, 2])
    base = model.unload()
    for method in (model.unload, model.merge_and_unload):
        with Unchanged(base, family), pytest.raises(ValueError, match=r"merged or unloaded already"):
            method()


@pytest.mark.parametrize("names", [["nobody"], ["default", "second"], [], ["second", "nobody"]])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_no_one_adapter(method, names, device):
    model = make_eas("llama", device, [0, 2], "running")
    model.add_adapter("second", EASConfig(task_type="CAUSAL_LM", num_skip=1))
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=r"merges one adapter.*default.*second"):
        getattr(model, method)(adapter_names=names)


def test_merging_another_adapter_into_a_merged_base(device):
    model = make_eas("llama", device, [0, 2], "running")
    model.add_adapter("second", EASConfig(task_type="CAUSAL_LM", num_skip=1, context="running"))
    model.eval().merge_adapter()
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=r"'default'.*unmerge_adapter\(\)"):
        model.merge_and_unload(adapter_names=["second"])
    with Unchanged(model, "llama"), pytest.raises(ValueError, match=r"active adapter.*set_adapter\('second'\)"):
        model.merge_adapter(adapter_names=["second"])


def test_switching_adapters_while_one_is_merged(device):
    """PEFT unmerges the first; the outputs are never a mixture of both."""
    inputs = make_inputs("llama", device)
    model = make_eas("llama", device, [0, 2], "running")
    torch.manual_seed(4)
    second = EASConfig(
        task_type="CAUSAL_LM", r=8, attention_r=4, dropout=0.0, init_weights=False, context="running",
        skipped_modules=mha_names("llama", [3]),
    )  # fmt: skip
    model.add_adapter("second", second)
    model.eval().set_adapter("second")
    expected = logits(model, inputs)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("second")
    assert difference(logits(model, inputs), expected) <= 1e-5


class QuantisedLinear(nn.Linear):
    """Stands for a layer of a quantisation library: an int8 weight with a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("where", ["model.layers.3.self_attn.v_proj", "model.layers.2.mlp.up_proj"])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_in_a_quantised_base(method, where, device):
    """In the last projection alone, so that an eager merge would have changed the others."""
    base = build_model("llama", device)
    base.set_submodule(where, QuantisedLinear(base.get_submodule(where)))
    model = add_eas(base, "llama", [0, 2], "running")
    with (
        Unchanged(model, "llama"),
        pytest.raises(
            TypeError, match=rf"Cannot fold an adapter into {where}.*quantised.*int8.*float32, float16 or bfloat16"
        ),
    ):
        getattr(model, method)()


def test_a_quantised_base_trains_and_generates(device):
    base = build_model("llama", device)
    for i in range(LAYERS):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            path = f"model.layers.{i}.{name}"
            base.set_submodule(path, QuantisedLinear(base.get_submodule(path)))
    model = add_eas(base, "llama", [0, 2]).train()
    inputs = make_inputs("llama", device)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] % 2 == 0, -100)).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "eas_" in name]
    assert all(p.dtype == torch.float32 and p.device.type == device and p.grad is not None for p in adapters)
    model.eval().generate(**inputs, max_new_tokens=2)
    assert torch.isfinite(logits(model.unload(), inputs)).all()


def test_merging_where_something_has_wrapped_a_projection(device):
    model = add_eas(build_model("llama", device), "llama", [0, 2], "running")
    inner = model.base_model.model.model.layers[1].self_attn.base_layer
    inner.q_proj = nn.Sequential(inner.q_proj)
    with Unchanged(model, "llama"), pytest.raises(TypeError, match=r"Cannot fold .*q_proj, a Sequential"):
        model.merge_and_unload()


OTHER_METHODS = {
    "LoRA": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LN tuning": LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("given", ["PeftModel", "the model inside"])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_eas_over_another_methods_adapters(method, given, device):
    other = get_peft_model(build_model("llama", device), copy.deepcopy(OTHER_METHODS[method]))
    if method == "prompt tuning" and given != "PeftModel":
        pytest.skip("a prompt is not in the model itself")
    base = other if given == "PeftModel" else other.base_model.model
    found = "prompt_encoder" if method == "prompt tuning" else r"layers\.0\."
    message = rf"another PEFT method already \(.*{found}.*train LoRA, merge it.*or train EAS, merge it"
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    with Unchanged(base, "llama"), pytest.raises(ValueError, match=message):
        get_peft_model(base, EASConfig(num_skip=2))
    assert type(other.peft_config["default"]) is type(OTHER_METHODS[method])
    assert trainable == [name for name, parameter in base.named_parameters() if parameter.requires_grad] != []


def test_eas_over_lora_in_an_encoder(device):
    lora = get_peft_model(build_model("bert", device), LoraConfig(target_modules=["query"]))
    with Unchanged(lora, "bert"), pytest.raises(ValueError, match=r"query is a peft\.tuners\.lora"):
        get_peft_model(lora, EASConfig(task_type="SEQ_CLS", num_skip=2))


def test_loading_eas_over_lora(folder, device):
    lora = get_peft_model(build_model("llama", device), LoraConfig(target_modules=["q_proj"]))
    with Unchanged(lora, "llama"), pytest.raises(ValueError, match="adapters of another PEFT method already"):
        PeftModel.from_pretrained(lora, folder)


def losses(model, inputs, steps=6):
    """Of some steps of training on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


@pytest.mark.parametrize("order", ["LoRA, merge, EAS", "EAS, merge, LoRA"])
def test_the_two_orders_of_lora_and_eas_that_work(order, device, tmp_path):
    """Each method trains, merges without loss, and the other goes on from there."""
    names = mha_names("llama", [1, 2])
    configs = {
        "LoRA": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]),
        "EAS": lambda: EASConfig(task_type="CAUSAL_LM", skipped_modules=names, context="running"),
    }
    model, inputs = build_model("llama", device), make_inputs("llama", device)
    for method in [part for part in order.split(", ") if part != "merge"]:
        model = get_peft_model(model, configs[method]())
        course = losses(model, inputs)
        assert course[-1] < course[0] - 0.05, (method, course)
        expected = logits(model, inputs)
        model = model.merge_and_unload().eval()
        assert difference(logits(model, inputs), expected) <= 1e-5, method
    assert [f"model.{name}" for name in sorted(model.config.eas["skipped"])] == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert difference(logits(loaded, inputs), expected) <= 1e-5


def test_a_skip_set_that_changed_while_a_cache_is_in_use(device):
    """From kept to skipped and back, with a frozen context, where no context is missing."""
    config = EASConfig(r=8, attention_r=4, dropout=0.0, init_weights=False, num_skip=1, context="running")
    model = get_peft_model(build_model("llama", device), config).eval()
    inputs = make_inputs("llama", device)
    step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(2, 13, device=device)}
    for before, after in (([], [1]), ([1], [])):
        model.set_skipped_modules(mha_names("llama", before))
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            model.set_skipped_modules(mha_names("llama", after))
            with pytest.raises((ValueError, RuntimeError)):
                model(**step, past_key_values=cache, use_cache=True)
