"""A base whose weights device_map keeps on disk or on the CPU: adapted, merged and saved as any other."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import SKIPS, add_eas, build_model, difference, logits, make_eas, make_inputs, mha_names
from families import ARCHITECTURES
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from peft_eas import EASConfig

FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
BLOCKS = {"gpt2": "transformer.h"}


def on_disk(family, folder, layers=range(4)):
    """A base of which the blocks `layers` are on disk."""
    build_model(family).save_pretrained(folder / "base")
    blocks = BLOCKS.get(family, "model.layers")
    names = {f"{blocks}.{i}": "disk" if i in layers else "cpu" for i in range(4)}
    body = blocks.partition(".")[0]
    others = [
        name for name, _ in build_model(family).get_submodule(body).named_children() if f"{body}.{name}" != blocks
    ]
    device_map = {**names, **{f"{body}.{name}": "cpu" for name in others}, "lm_head": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", device_map=device_map, offload_folder=folder / "disk")
    assert any(parameter.is_meta for parameter in base.parameters())
    return base.eval()


def on_cpu(family, folder):
    base = build_model(family)
    for name in mha_names(family):
        block = cpu_offload(base.get_submodule(name.rpartition(".")[0]), execution_device="cpu")
        assert all(parameter.is_meta for parameter in block.parameters())
    base.hf_device_map = {"blocks": "cpu", "others": "a GPU"}  # as device_map leaves it; transformers saves by it
    return base


PLACES = {"disk": on_disk, "half on disk": lambda *args: on_disk(*args, layers=(0, 3)), "cpu": on_cpu}


@pytest.mark.parametrize("place", PLACES)
@FAMILIES
def test_adapted_merged_and_saved(family, place, tmp_path):
    inputs = make_inputs(family, "cpu")
    expected = logits(make_eas(family, "cpu", SKIPS["half"], "running"), inputs)
    model = add_eas(PLACES[place](family, tmp_path), family, SKIPS["half"], "running")
    before = logits(model.get_base_model(), inputs)
    assert difference(before, expected) <= 1e-6
    model.merge_adapter(safe_merge=True)
    assert difference(logits(model, inputs), expected) <= 1e-5
    model.unmerge_adapter()
    assert difference(logits(model, inputs), expected) <= 1e-5
    merged = model.merge_and_unload(safe_merge=True)
    assert difference(logits(merged, inputs), expected) <= 1e-5
    assert any(parameter.is_meta for parameter in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference(logits(loaded, inputs), expected) <= 1e-5


@FAMILIES
def test_the_adapter_is_trained_and_off_means_off(family, tmp_path):
    inputs = make_inputs(family, "cpu")
    model = add_eas(on_disk(family, tmp_path), family, SKIPS["half"])
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(build_model(family).requires_grad_(False), inputs))
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@FAMILIES
def test_loading_an_adapter_onto_a_base_on_disk(family, tmp_path):
    """PEFT's way is refused, with one that works."""
    saved = make_eas(family, "cpu", SKIPS["half"])
    saved.save_pretrained(tmp_path / "adapter")
    expected = logits(saved, make_inputs(family, "cpu"))
    with pytest.raises(ValueError, match=r"on disk.*from_pretrained\(\) does not.*set_peft_model_state_dict"):
        PeftModel.from_pretrained(on_disk(family, tmp_path), tmp_path / "adapter")
    model = get_peft_model(on_disk(family, tmp_path), EASConfig.from_pretrained(tmp_path / "adapter")).eval()
    set_peft_model_state_dict(model, load_peft_weights(tmp_path / "adapter"))
    assert difference(logits(model, make_inputs(family, "cpu")), expected) <= 1e-6


def test_adapters_do_not_stay_in_front_of_offloaded_weights(tmp_path):
    model, inputs = add_eas(on_disk("llama", tmp_path), "llama", SKIPS["half"]), make_inputs("llama", "cpu")
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=r"device_map offloads .*context='prompt'.*such as 'cpu'"):
        model.merge_and_unload(context="prompt")
    assert torch.equal(logits(model, inputs), expected)


def test_experts_that_are_offloaded_are_refused_before_anything_changes(tmp_path):
    """Their weights are no modules that could be fetched one at a time."""
    family = ARCHITECTURES["mixtral"]
    base = family.build()
    cpu_offload(base.get_submodule("model.layers.0"), execution_device="cpu")
    config = EASConfig(skipped_modules=mha_names("llama", [0]), context="running", init_weights=False, r=8)
    model, inputs = get_peft_model(base, config).eval(), family.make_inputs()
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match=r"model\.layers\.0\..* are not in memory.*such as 'cpu'"):
        model.merge_and_unload()
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_what_accelerate_does_around_a_block_stays(context):
    """As where blocks lie on several devices, and the hidden states are moved in front of each."""

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    base, inputs = build_model("llama"), make_inputs("llama", "cpu")
    hooks = [Count() for _ in range(4)]
    for name, hook in zip(mha_names("llama"), hooks):
        add_hook_to_module(base.get_submodule(name.rpartition(".")[0]), hook)
    model = add_eas(base, "llama", SKIPS["half"], context, warm=False)
    expected = logits(model, inputs)
    merged = model.merge_and_unload(context=context)
    assert difference(logits(merged, inputs), expected) <= 1e-5
    assert [hook.calls for hook in hooks] == [2] * 4
