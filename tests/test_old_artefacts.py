"""What version 0.1.0 of November 2026 has written still loads: adapters, merged models, a search, a checkpoint.

`old_artefacts` was written by that code from the tiny models of conftest.py and the run of training.py, with what the
models said in expected.safetensors.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, build_model, difference, logits, make_inputs
from peft import PeftModel
from processes import run_alone
from safetensors.torch import load_file, save_file
from training import SCHEDULE, make_model, make_trainer

from peft_eas import EASCallback
from peft_eas.reporting.plots import plot_search_curve

FOLDER = Path(__file__).parent / "old_artefacts"
EXPECTED = load_file(FOLDER / "expected.safetensors")
AUTO = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
every = pytest.mark.parametrize(("family", "context"), [(f, c) for f in AUTO for c in ("running", "prompt")])


@every
def test_adapters(family, context):
    model = PeftModel.from_pretrained(build_model(family), FOLDER / f"{family}_{context}_adapter").eval()
    assert model.peft_config["default"].context == context
    assert difference(logits(model, make_inputs(family, "cpu")), EXPECTED[f"{family}_{context}"]) <= 1e-5


@every
def test_merged_models(family, context):
    model = getattr(transformers, AUTO[family]).from_pretrained(FOLDER / f"{family}_{context}_merged").eval()
    assert isinstance(model, getattr(transformers, FAMILIES[family][1]))
    assert difference(logits(model, make_inputs(family, "cpu")), EXPECTED[f"{family}_{context}"]) <= 1e-5


def test_a_merged_model_by_the_code_that_lies_beside_it(tmp_path):
    shutil.copytree(FOLDER / "llama_running_merged", tmp_path / "model")
    code = (
        "import sys, torch, transformers; from safetensors.torch import load_file, save_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True).eval()\n"
        "ids = load_file('ids.safetensors')['ids']\n"
        "save_file({'logits': model(input_ids=ids).logits.detach()}, 'logits.safetensors')\n"
        "assert 'peft_eas' not in sys.modules\n"
    )
    save_file({"ids": make_inputs("llama", "cpu")["input_ids"]}, tmp_path / "ids.safetensors")
    run_alone(code, folder=tmp_path)
    assert difference(load_file(tmp_path / "logits.safetensors")["logits"], EXPECTED["llama_running"]) <= 1e-5


def test_a_run_goes_on_from_the_middle_of_its_search(tmp_path):
    shutil.copytree(FOLDER / "checkpoint-8", tmp_path / "checkpoint-8")
    with pytest.raises(
        ValueError, match=r"eas_output\.default\.\w+ is missing .* goes on with .* EASConfig\(output_r=0, ffn_r=0\)"
    ):
        make_trainer(tmp_path, EASCallback(**SCHEDULE)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), make_model(output_r=0))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    record = json.loads((FOLDER / "eas_search.json").read_text())
    assert trainer.model.base_model.skipped_modules == record["skipped_modules"]
    if torch.__version__.startswith("2.13"):  # by which it was written; others draw other dropout
        actual = logits(trainer.model.eval(), make_inputs("llama", "cpu"))
        assert difference(actual, EXPECTED["trained"]) <= 1e-3


def test_a_search_is_drawn(tmp_path):
    plot_search_curve(FOLDER, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
