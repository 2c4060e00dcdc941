"""An adapter that is copied, averaged, cast or trained by its parameters keeps its frozen context."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import build_model, difference, logits, make_eas, make_inputs, mha_names, warm_up
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel

from peft_eas import EASConfig

families = pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])


def means(model) -> dict[str, torch.Tensor]:
    """The running means of all adapters, parameters or not, by name."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("running_context")}


def copy_by_parameters(model: PeftModel, name: str, without: str = "none") -> None:
    """Adds an adapter and gives it the parameters of the first, as TRL does for its reference model."""
    model.add_adapter(name, model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if ".default." in key and without not in key:
            model.get_parameter(key.replace(".default.", f".{name}.")).data.copy_(parameter.data)
    model.train(model.training)  # the new modules too


@families
@pytest.mark.parametrize("context", ["running", "prompt"])
def test_a_copy_by_parameters_computes_the_same(family, context, device):
    model, inputs = make_eas(family, device, [0, 2], context), make_inputs(family, device)
    expected = logits(model, inputs)
    copy_by_parameters(model, "copy")
    model.set_adapter("copy")
    assert torch.equal(logits(model, inputs), expected)
    if context == "running":
        assert difference(logits(model.merge_and_unload(), inputs), expected) < 1e-5


@families
def test_a_soup_has_the_mean_of_the_contexts(family, device):
    ingredients = []
    for seed in (0, 1):
        model = make_eas(family, device, [0, 2], "running")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".eas_" in name:
                    torch.manual_seed(seed)
                    parameter.add_(0.1 * torch.randn(parameter.shape).to(device))
        ingredients.append(model)
    soup = copy.deepcopy(ingredients[0])
    with torch.no_grad():
        for mine, other in zip(soup.parameters(), ingredients[1].parameters(), strict=True):
            mine.lerp_(other, 0.5)
    first, second = map(means, ingredients)
    assert len(first) == 4
    for name, value in means(soup).items():
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_an_averaged_model_follows_the_context(device):
    model, inputs = make_eas("llama", device, [0, 2], "running"), make_inputs("llama", device)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    before = means(copy.deepcopy(model))
    with torch.no_grad():
        for value in means(model).values():
            value.add_(1.0)
    average.update_parameters(model)
    for name, value in means(average.module).items():
        torch.testing.assert_close(value, before[name] + 0.25)
    assert logits(average.module.eval(), inputs).isfinite().all()


@families
@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_cast_leaves_the_running_mean(family, context, cast, device):
    model = make_eas(family, device, [0, 2], context)
    expected = {name: value.clone() for name, value in means(model).items()}
    getattr(model, cast)()
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith("running_context")} != {torch.float32}
    for name, value in means(model).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])
    assert logits(model, make_inputs(family, device)).isfinite().all()


def test_a_cast_and_a_move_at_once(device):
    model = make_eas("llama", device, [0, 2], "running").to("cpu")
    expected = {name: value.clone() for name, value in means(model).items()}
    model.to(device, torch.bfloat16)
    for name, value in means(model).items():
        assert (value.device.type, value.dtype) == (torch.device(device).type, torch.float32)
        assert torch.equal(value.cpu(), expected[name])


def test_a_frozen_context_is_a_parameter_and_never_trained(device):
    model = make_eas("llama", device, [0, 2], "running")
    trained = sum(p.numel() for n, p in model.named_parameters() if ".eas_" in n and "running_context" not in n)
    frozen = [value for name, value in model.named_parameters() if name.endswith("running_context")]
    assert len(frozen) == 4
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model.set_requires_grad("default", requires_grad=True),
    ):
        change()
        assert not any(parameter.requires_grad for parameter in frozen)
        assert model.get_nb_trainable_parameters()[0] == trained
        assert model.get_model_status().requires_grad == {"default": True}


def test_weight_decay_does_not_reach_a_frozen_context(device):
    model, inputs = make_eas("llama", device, [0, 2], "running").train(), make_inputs("llama", device)
    model.requires_grad_(True)  # whatever is switched on by hand
    expected = {name: value.clone() for name, value in means(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, expected[name]) for name, value in means(model).items())


# --- lost contexts ---------------------------------------------------------------------------------------------------

LOST = (
    r"running mean of the EAS adapter 'copy' for \S+ is zero, but its config says.*context_recorded=True.*Copy all of"
)


@families
@pytest.mark.parametrize("use", ["forward", "merge_and_unload", "merge_adapter"])
def test_a_copy_without_the_context_is_refused(family, use, device):
    model, inputs = make_eas(family, device, [0, 2], "running"), make_inputs(family, device)
    expected = logits(model, inputs)
    copy_by_parameters(model, "copy", without="running_context")
    model.set_adapter("copy")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=LOST):
        model(**inputs) if use == "forward" else getattr(model, use)()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), expected)


def test_what_was_never_recorded_and_trained_so_is_no_loss(device, tmp_path):
    """Context "running" from the start, as for packed data: zero is what such an adapter was trained with."""
    config = EASConfig(
        task_type="CAUSAL_LM", skipped_modules=mha_names("llama", [0, 2]), context="running", r=8, init_weights=False
    )
    model, inputs = get_peft_model(build_model("llama", device), config), make_inputs("llama", device)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = logits(model.eval(), inputs)
    assert not config.context_recorded
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama", device), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    copy_by_parameters(loaded, "copy")
    loaded.set_adapter("copy")
    assert torch.equal(logits(loaded, inputs), expected)
    assert difference(logits(loaded.merge_and_unload(), inputs), expected) < 1e-5


@pytest.mark.parametrize("skip", [[0, 2], []])
def test_a_context_frozen_before_any_training_is_no_loss(skip, device):
    model, inputs = make_eas("llama", device, skip, warm=False), make_inputs("llama", device)
    with pytest.warns(UserWarning, match="to train on, zero serves as well"):
        model.freeze_context()
    expected = logits(model, inputs)
    assert expected.isfinite().all()
    assert not model.peft_config["default"].context_recorded
    assert difference(logits(model.merge_and_unload(), inputs), expected) < 1e-5


def test_an_identity_lacks_nothing(device):
    """A new adapter by the config of a frozen one, which someone may fill with weights later."""
    config = copy.deepcopy(make_eas("llama", device, [0, 2], "running").peft_config["default"])
    config.init_weights = True
    model, inputs = get_peft_model(build_model("llama", device), config).eval(), make_inputs("llama", device)
    assert logits(model, inputs).isfinite().all()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.add_(0.1)
    with pytest.raises(ValueError, match="to train a new adapter by this config, set context='prompt'"):
        model(**inputs)


# --- files -----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("context", ["prompt", "running"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_are_as_they_were_and_load_without_the_new_field(family, context, low_cpu_mem_usage, device, tmp_path):
    """Names, shapes and types of the statistics are those of files that were written before they were parameters."""
    model, inputs = make_eas(family, device, [0, 2], context), make_inputs(family, device)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        kinds = {
            (key.rpartition(".")[2], file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape()))
            for key in file.keys()  # noqa: SIM118
            if key.endswith(("running_context", "num_contexts"))
        }
    assert kinds == {("running_context", "F32", (32,)), ("num_contexts", "I64", ())}
    forget_field(tmp_path)
    base = build_model(family, device)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.endswith("running_context"))
    copy_by_parameters(loaded, "copy")
    loaded.set_adapter("copy")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def forget_field(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["context_recorded"]
    path.write_text(json.dumps(config))


def test_the_state_dict_of_an_adapter_has_the_context(device):
    for context in ("prompt", "running"):
        model = make_eas("llama", device, [0, 2], context)
        state = get_peft_model_state_dict(model)
        assert sum(name.endswith("running_context") for name in state) == 4
        assert all(value.abs().sum() > 0 for name, value in state.items() if name.endswith("running_context"))


def test_the_running_mean_still_moves_until_it_is_frozen(device):
    model = make_eas("llama", device, [0, 2], "prompt")
    before = {name: value.clone() for name, value in means(model).items()}
    warm_up(model, "llama")
    assert all(not torch.equal(value, before[name]) for name, value in means(model).items())
    model.freeze_context()
    before = {name: value.clone() for name, value in means(model).items()}
    warm_up(model, "llama")
    assert all(torch.equal(value, before[name]) for name, value in means(model).items())


def test_a_second_adapter_is_frozen_by_itself(device):
    model = make_eas("llama", device, [0, 2], "running")
    add = EASConfig(task_type="CAUSAL_LM", skipped_modules=mha_names("llama", [1]), r=8, attention_r=4)
    model.add_adapter("second", add)
    names = [name for name, _ in model.named_parameters() if name.endswith("running_context")]
    assert len(names) == 4
    assert all(".default." in name for name in names)
