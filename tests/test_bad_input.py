"""What does not fit gets an error with what was received, what is allowed and what to do; nothing is half-applied.

Bad values of the config and names that do not exist are in test_config.py, those given to `set_skipped_modules` in
test_model.py.
"""

import json
import shutil

import pytest
import torch
from conftest import LAYERS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_eas import EASConfig

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


def refuse_to_load(folder, message, device, family="llama", routes=("new", "second"), **changes):
    """Asserts that the adapter in `folder` is refused for a new model, which stays as it was, as do the files."""
    for load in routes:
        model = build_model(family, device, **changes)
        files = files_of(folder)
        if load == "second":  # beside an adapter that is there already
            model = add_eas(model, family, [1])
        with Unchanged(model, family), pytest.raises(ValueError, match=message):
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
        ({"skipped_modules": mha_names("llama", [1, 3])}, r"do not fit"),
        ({"skipped_modules": ["model.layers.7.self_attn"]}, r"layers\.7.*cannot be skipped"),
        ({"num_skip": 3}, r"num_skip=3 contradicts skipped_modules"),
        ({"attention_r": 0}, r"do not fit.*self_attn"),
        ({"context": "image"}, r"context must be 'prompt' or 'running'"),
    ],
)
def test_a_config_that_was_changed_by_hand(changes, message, folder, device):
    change_config(folder, **changes)
    refuse_to_load(folder, message, device)


def test_saving_refuses_nothing_that_loading_accepts(folder, device):
    model = PeftModel.from_pretrained(build_model("llama", device), folder)
    model.save_pretrained(folder)
    PeftModel.from_pretrained(build_model("llama", device), folder)


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


@pytest.mark.parametrize("kind", ["lora first", "lora second"])
def test_merging_where_another_method_has_wrapped_the_projections(kind, device):
    """PEFT's own mixed use: LoRA on a projection that is to be folded into."""
    base = build_model("llama", device)
    if kind == "lora first":
        base = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).base_model.model
        model = add_eas(base, "llama", [0, 2], "running")
        with Unchanged(model, "llama"), pytest.raises(TypeError, match=r"Cannot fold .*q_proj.*(LoRA|lora)"):
            model.merge_and_unload()
    else:
        model = add_eas(base, "llama", [0, 2], "running")
        inner = model.base_model.model.model.layers[1].self_attn.base_layer
        inner.q_proj = nn.Sequential(inner.q_proj)
        with Unchanged(model, "llama"), pytest.raises(TypeError, match=r"Cannot fold .*q_proj, a Sequential"):
            model.merge_and_unload()


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
