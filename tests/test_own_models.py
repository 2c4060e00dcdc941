"""A model that is defined outside of transformers: merged, saved, and loaded wherever it may be."""

import importlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from processes import run_alone
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from peft_eas import EASConfig
from peft_eas.runtime.checkpoint import CODE_FILE
from peft_eas.runtime.merged import register_family

MODULE = """
from torch import nn
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, LlamaConfig, PreTrainedConfig, PreTrainedModel
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
{extra}

class OwnConfig(PreTrainedConfig):
    model_type = "own"
    sub_configs = {{"text_config": LlamaConfig}}
    text_config: dict | LlamaConfig | None = None

    def __post_init__(self, **kwargs):
        self.text_config = self.text_config or {{}}
        if isinstance(self.text_config, dict):
            self.text_config = LlamaConfig(**self.text_config)
        super().__post_init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.text = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        return self.text(input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                         use_cache=use_cache, **kwargs)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache, **kwargs)
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state), past_key_values=outputs.past_key_values
        )


AutoConfig.register("own", OwnConfig, exist_ok=True)
AutoModel.register(OwnConfig, OwnModel, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
"""
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 31}
SKIPPED = ["model.text.layers.0.self_attn", "model.text.layers.2.self_attn"]
# Loads, compares, saves, and loads that.
WORKER = """
import json, sys, torch, transformers
folder, expected, again = json.loads(sys.argv[1])
ids, logits = torch.load(expected)
for where in (folder, again):
    model = transformers.AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
    assert type(model).__name__ == "EASOwnForCausalLM"
    assert torch.equal(model(ids).logits, logits), where
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 8)
    body = transformers.AutoModel.from_pretrained(where, trust_remote_code=True)
    assert type(body).__name__ == "EASOwnModel"
    model.save_pretrained(again)
assert not any(name.startswith(("peft_eas", "own_whole")) for name in sys.modules)
"""


def own_module(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, extra: str = ""):
    """The module, written and imported as a user's own."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(MODULE.format(extra=extra))
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def with_adapters(base, skipped=SKIPPED):
    torch.manual_seed(1)
    config = EASConfig(task_type="CAUSAL_LM", skipped_modules=skipped, r=4, attention_r=2, init_weights=False)
    return get_peft_model(base.eval(), config).eval()


def merged_model(module, context: str = "running"):
    torch.manual_seed(0)
    return with_adapters(module.OwnForCausalLM(module.OwnConfig(text_config=TEXT))).merge_and_unload(context=context)


def check_refused(model, message: str) -> None:
    """Merging is refused before anything changes."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_in_another_process_with_neither_package_nor_module(tmp_path, monkeypatch):
    module = own_module("own_whole", tmp_path / "source", monkeypatch)
    merged = merged_model(module)
    merged.save_pretrained(tmp_path / "merged")
    ids = torch.arange(10).reshape(2, 5)
    torch.save((ids, merged(ids).logits.detach()), tmp_path / "expected.pt")
    arguments = [str(tmp_path / name) for name in ("merged", "expected.pt", "again")]
    monkeypatch.undo()  # or it could be imported from where it lies
    run_alone(WORKER, json.dumps(arguments), folder=tmp_path)


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_save_and_load(context, tmp_path, monkeypatch):
    module = own_module("own_whole", tmp_path, monkeypatch)
    merged = merged_model(module, context)
    ids = torch.arange(10).reshape(2, 5)
    expected = merged(ids).logits
    merged.save_pretrained(tmp_path / "merged")
    assert "import own_whole  # OwnForCausalLM" in (tmp_path / "merged" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(merged)
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(ids).logits, expected)
    body = AutoModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head(body(ids).last_hidden_state), expected)
    body.save_pretrained(tmp_path / "body")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "body")  # with a new head
    assert torch.equal(headed.model(ids).last_hidden_state, body(ids).last_hidden_state)


def test_a_module_that_needs_its_package_is_asked_for(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "part.py").write_text("")
    (package / "modeling.py").write_text(MODULE.format(extra="from own_package import part"))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("own_package.modeling")
    merged_model(module).save_pretrained(tmp_path / "merged")
    code = (tmp_path / "merged" / CODE_FILE).read_text()
    assert code.endswith("from own_package.modeling import OwnConfig, OwnForCausalLM, OwnModel\n")
    assert not (tmp_path / "merged" / "modeling.py").exists()
    monkeypatch.undo()
    for name in ("own_package", "own_package.modeling", "own_package.part"):
        sys.modules.pop(name, None)
    with pytest.raises(ImportError, match="own_package"):
        get_class_from_dynamic_module("modeling_eas.EASOwnConfig", str(tmp_path / "merged"))


def test_a_model_that_is_not_registered_is_refused_before_anything_changes(tmp_path, monkeypatch):
    module = own_module("own_whole", tmp_path, monkeypatch)
    config = type("StrayConfig", (module.OwnConfig,), {"model_type": "stray"})
    stray = type("StrayModel", (module.OwnForCausalLM,), {"config_class": config, "config": config})
    model = with_adapters(stray(config(text_config=TEXT)))
    check_refused(model, r"do not know the model type 'stray'.*AutoConfig.register\('stray'")
    with pytest.raises(ValueError, match=r"do not know the model type 'nothing'"):
        register_family("nothing")


def test_a_model_that_would_load_as_another_is_refused(tmp_path, monkeypatch):
    layers = [f"model.layers.{i}.self_attn" for i in (0, 2)]
    mine = type("MyLlama", (LlamaForCausalLM,), {"__module__": __name__})
    check_refused(with_adapters(mine(LlamaConfig(**TEXT)), layers), r"No Auto class knows MyLlama.*AutoModel.register")
    config = type("MyConfig", (LlamaConfig,), {})
    mine = type("MyLlama", (LlamaForCausalLM,), {"__module__": __name__, "config_class": config, "config": config})
    message = r"model type 'llama' is LlamaConfig's.* load for this MyLlama.* MyConfig a model_type of its own"
    check_refused(with_adapters(mine(config(**TEXT)), layers), message)
    module = own_module("own_whole", tmp_path, monkeypatch)
    other = type("OtherHead", (module.OwnForCausalLM,), {})
    check_refused(with_adapters(other(module.OwnConfig(text_config=TEXT))), "No Auto class knows OtherHead")


def test_a_base_that_was_registered_for_auto_classes(tmp_path, monkeypatch):
    module = own_module("own_whole", tmp_path, monkeypatch)
    module.OwnConfig.register_for_auto_class()
    module.OwnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    merged = merged_model(module)
    merged.save_pretrained(tmp_path / "merged")
    ids = torch.arange(10).reshape(2, 5)
    for trust in (False, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=trust)
        assert torch.equal(loaded(ids).logits, merged(ids).logits)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("__main__", r"OwnConfig, OwnForCausalLM, OwnModel .* script that runs.*into a module"),
        ("transformers_modules.own.modeling", r"trust_remote_code and needs other files.*into one file, own_parts.py"),
    ],
)
def test_classes_that_no_other_process_could_import_are_not_saved(place, message, tmp_path, monkeypatch):
    (tmp_path / "own_part.py").write_text("")
    module = own_module("own_parts", tmp_path, monkeypatch, extra="import own_part")
    (tmp_path / "own_parts.py").write_text(MODULE.format(extra="from . import own_part"))
    monkeypatch.setitem(sys.modules, "transformers_modules.own.modeling", module)
    merged = merged_model(module)
    for own in (module.OwnConfig, module.OwnModel, module.OwnForCausalLM):
        monkeypatch.setattr(own, "__module__", place)
    with pytest.raises(ValueError, match=message):
        merged.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*"))


def test_a_class_that_nobody_knows():
    with pytest.raises(AttributeError, match=r"EASNobodysModel.*Import the module that defines"):
        importlib.import_module("peft_eas.runtime.merged").EASNobodysModel  # noqa: B018
