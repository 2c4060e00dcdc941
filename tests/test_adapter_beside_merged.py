"""An adapter in the folder of a merged model is applied only if it was trained on that model."""

import json

import pytest
import torch
from conftest import SKIPS, add_eas, build_model, difference, logits, make_eas, make_inputs
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

IN_THE_WAY = r"Beside the merged model.*adapter_config\.json, adapter_model\.safetensors.*twice.*folder of their own"


def without_mark(folder):
    """As adapters were saved before they told merged models apart."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["base_shape"]["merged"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(("family", "skip"), [("llama", "none"), ("llama", "half"), ("gpt2", "half")])
def test_the_adapter_that_was_merged(family, skip, is_old, tmp_path):
    model = make_eas(family, "cpu", SKIPS[skip], "running")
    model.save_pretrained(tmp_path)
    if is_old:
        without_mark(tmp_path)
    expected = logits(model, make_inputs(family, "cpu"))
    merged = model.merge_and_unload()
    with pytest.warns(UserWarning, match=rf"will not load from there\. {IN_THE_WAY}"):
        merged.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, type(merged)):
        with pytest.raises(ValueError, match=IN_THE_WAY):
            load.from_pretrained(tmp_path)
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).rename(tmp_path / "adapter" / name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(logits(loaded, make_inputs(family, "cpu")), expected) <= 1e-5
    again = PeftModel.from_pretrained(build_model(family), tmp_path / "adapter")
    assert torch.equal(logits(again, make_inputs(family, "cpu")), expected)
    if not is_old:
        message = rf"before its merge, but {type(merged).__name__} is a merged one, into which it may have gone"
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(loaded, tmp_path / "adapter")


def test_a_merged_model_that_stays_a_stock_one(tmp_path, monkeypatch):
    """GPT-2's projections have biases, so that nothing is new in it where nothing is skipped."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # none of it is needed
    model = make_eas("gpt2", "cpu", [], "running")
    model.save_pretrained(tmp_path)
    expected = logits(model, make_inputs("gpt2", "cpu"))
    merged = model.merge_and_unload()
    assert type(merged) is GPT2LMHeadModel
    merged.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"before its merge, but GPT2LMHeadModel is a merged one.*files beside its own"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(logits(loaded, make_inputs("gpt2", "cpu")), expected) <= 1e-5


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("skip", ["none", "half"])
def test_an_adapter_that_was_trained_on_the_merged_model(skip, is_old, tmp_path, monkeypatch):
    make_eas("llama", "cpu", SKIPS[skip], "running").merge_and_unload().save_pretrained(tmp_path)
    model = add_eas(AutoModelForCausalLM.from_pretrained(tmp_path), "llama", [1], "running", target_modules=None)
    expected = logits(model, make_inputs("llama", "cpu"))
    model.save_pretrained(tmp_path)
    if is_old:
        without_mark(tmp_path)
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # none of it is needed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, make_inputs("llama", "cpu")), expected)
