"""A new head that would stay frozen is told of, by its name; a trained one is not."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import build_model
from peft import PeftModel, get_peft_model

from peft_eas import EASConfig

# By class with a head: the family whose bare model it is loaded from, its new heads, and the task that trains these.
CASES = {
    "ViTForImageClassification": ("vit", "classifier", None),
    "BertForSequenceClassification": ("bert", "classifier", "SEQ_CLS"),
    "BertForMultipleChoice": ("bert", "classifier", "SEQ_CLS"),
    "BertForQuestionAnswering": ("bert", "qa_outputs", "QUESTION_ANS"),
    "LlamaForSequenceClassification": ("llama", "score", "SEQ_CLS"),  # without a bias
    "LlamaForTokenClassification": ("llama", "score", "TOKEN_CLS"),
}


@pytest.fixture
def with_new_head(tmp_path):
    """Loads a class from the checkpoint of a model without its head."""

    def load(name):
        model = build_model(CASES[name][0])
        getattr(model, model.base_model_prefix).save_pretrained(tmp_path / "bare")
        return getattr(transformers, name).from_pretrained(tmp_path / "bare")

    return load


def head_warnings(model, **options):
    """The warnings about heads, and whether each part of the head is trained."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(model, EASConfig(num_skip=1, context="running", **options))
    return [str(one.message) for one in caught if "head" in str(one.message)], model


@pytest.mark.parametrize("name", CASES)
def test_a_new_head_that_stays_frozen(name, with_new_head):
    head = CASES[name][1]
    found, model = head_warnings(with_new_head(name))
    assert len(found) == 1
    assert f"{name} has a head that looks new ({head})" in found[0]
    assert found[0].endswith(f"give EASConfig(modules_to_save=['{head}']).")
    assert not any(p.requires_grad for key, p in model.named_parameters() if head in key)


@pytest.mark.parametrize("name", CASES)
def test_a_new_head_that_is_trained(name, with_new_head):
    base, (_, head, task) = with_new_head(name), CASES[name]
    for options in ({"modules_to_save": [head]}, {"task_type": task}) if task else ({"modules_to_save": [head]},):
        found, model = head_warnings(copy.deepcopy(base), **options)
        assert found == []
        assert any(p.requires_grad for key, p in model.named_parameters() if head in key)


@pytest.mark.parametrize("name", CASES)
def test_a_head_that_was_trained_already(name, with_new_head, tmp_path):
    model = with_new_head(name)
    head = getattr(model, CASES[name][1])
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(tmp_path / "trained")
    found, _ = head_warnings(getattr(transformers, name).from_pretrained(tmp_path / "trained"))
    assert found == []


def test_a_head_with_another_number_of_classes(tmp_path):
    build_model("vit").save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert len(head_warnings(model)[0]) == 1


def test_other_heads_that_are_to_be_kept_are_named_too(with_new_head):
    found, _ = head_warnings(with_new_head("ViTForImageClassification"), modules_to_save=["layernorm"])
    assert "modules_to_save=['layernorm', 'classifier']" in found[0]


def test_a_model_without_a_head_and_one_that_generates(tmp_path):
    build_model("llama").save_pretrained(tmp_path)
    for name in ("AutoModel", "AutoModelForCausalLM"):
        assert head_warnings(getattr(transformers, name).from_pretrained(tmp_path))[0] == []


def test_loading_an_adapter_says_nothing(with_new_head, tmp_path):
    base = with_new_head("ViTForImageClassification")
    head_warnings(base)[1].save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*head that looks new")
        PeftModel.from_pretrained(with_new_head("ViTForImageClassification"), tmp_path / "adapter")
