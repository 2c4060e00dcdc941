"""Tokens that are trained beside the adapters: PEFT's `trainable_token_indices`, as LoRA has it."""

import math

import pytest
import torch
from conftest import VOCAB, build_model, difference, logits, mha_names
from families import ARCHITECTURES, SPECIAL_TOKENS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_architectures import output
from transformers import AutoModelForCausalLM

from peft_eas import EASConfig, eas_summary
from peft_eas.export import to_decilm

EMBEDDINGS = {
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "gemma3": "model.embed_tokens",  # which scales what it looks up
}
TOKENS = [58, 59]
INPUTS = {"input_ids": torch.tensor([[58, 3, 59, 7, 8], [2, 59, 58, 4, 5]])}


def make_config(family: str, tokens=TOKENS, skip=(1, 3), **options) -> EASConfig:
    defaults = {"r": 8, "attention_r": 4, "context": "none", "dropout": 0.0, "init_weights": False}
    return EASConfig(
        task_type="CAUSAL_LM",
        skipped_modules=mha_names(family, list(skip)),
        trainable_token_indices=tokens,
        **{**defaults, **options},
    )


def train_tokens(model: PeftModel, name: str = "default", seed: int = 5) -> None:
    """Draws the trained rows anew, as training would have changed them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(f"trainable_tokens_delta.{name}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def make_model(family: str, tied: bool, **options) -> PeftModel:
    base = build_model(family, tie_word_embeddings=tied)
    torch.manual_seed(1)
    model = get_peft_model(base, make_config(family, **options))
    train_tokens(model)
    return model.eval()


def rows_of(model, family: str) -> torch.Tensor:
    return model.get_submodule(EMBEDDINGS[family]).weight.detach().clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(EMBEDDINGS))
def test_trained_tokens_are_saved_loaded_and_merged(tmp_path, family, tied) -> None:
    base = build_model(family, tie_word_embeddings=tied)
    model = make_model(family, tied)
    expected = logits(model, INPUTS)
    with model.disable_adapter():
        assert torch.equal(logits(model, INPUTS), logits(base, INPUTS))

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build_model(family, tie_word_embeddings=tied), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, INPUTS), expected)

    # The model that has these rows in the first place, with the same adapters.
    rows = base.get_submodule(EMBEDDINGS[family]).weight
    delta = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        rows[TOKENS] = delta
    torch.manual_seed(1)
    same = get_peft_model(base, make_config(family, tokens=None)).eval()
    assert difference(expected, logits(same, INPUTS)) < 1e-6

    merged = model.merge_and_unload()
    assert torch.equal(rows_of(merged, family), rows)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert difference(logits(merged, INPUTS), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(reloaded, INPUTS), logits(merged, INPUTS))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "opt", "siglip", "llava", "paligemma", "modernbert"])
def test_other_families(tmp_path, name) -> None:
    """With adapters that are the identity, the model is its base with these rows, in all layers that share them."""
    family = ARCHITECTURES[name]
    base, inputs = family.build(), family.make_inputs()
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    tokens = sorted(set(ids.flatten().tolist()) - {0, *SPECIAL_TOKENS})[:6]
    before = output(base, inputs)
    config = EASConfig(num_skip=0, context="none", task_type=family.task_type, trainable_token_indices=tokens)
    model = get_peft_model(family.build(), config).eval()
    assert torch.equal(output(model, inputs), before)
    train_tokens(model)
    with torch.no_grad():
        rows = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
        base.get_input_embeddings().weight[tokens] = rows
    expected = output(model, inputs)
    assert difference(expected, before) > 1e-2
    assert difference(expected, output(base, inputs)) < 1e-6
    merged = model.merge_and_unload()
    assert difference(output(merged, inputs), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(type(merged).from_pretrained(tmp_path).eval(), inputs), output(merged, inputs))


@pytest.mark.parametrize("tied", [False, True])
def test_exported_models_have_the_trained_tokens(tmp_path, tied) -> None:
    merged = make_model("llama", tied).merge_and_unload()
    folder = to_decilm(merged, tmp_path)
    weights = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    assert torch.equal(weights["model.embed_tokens.weight"], merged.model.embed_tokens.weight)
    assert ("lm_head.weight" in weights) != tied
    assert tied or torch.equal(weights["lm_head.weight"], merged.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_only_these_tokens_are_trained_and_counted(tied) -> None:
    """The rows of other tokens stay as they are, and the file holds no more than these."""
    plain = get_peft_model(build_model("llama", tie_word_embeddings=tied), make_config("llama", tokens=None))
    model = get_peft_model(build_model("llama", tie_word_embeddings=tied), make_config("llama"))
    ours, without = (each.get_nb_trainable_parameters()[0] for each in (model, plain))
    assert ours - without == len(TOKENS) * 32
    sizes = [eas_summary(each).base_parameters for each in (model, plain)]
    assert sizes[0] == sizes[1]
    before = rows_of(build_model("llama", tie_word_embeddings=tied), "llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    optimizer.step()
    after = rows_of(model.eval().merge_and_unload(), "llama")
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == TOKENS


def test_tokens_that_are_added_twice_are_trained_once() -> None:
    """TRL extends the list that the user has given."""
    config = make_config("llama", tokens={"embed_tokens": [58]})
    config.trainable_token_indices["embed_tokens"].extend(TOKENS)
    model = get_peft_model(build_model("llama"), config)
    assert config.trainable_token_indices == {"embed_tokens": TOKENS}
    assert next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).shape == (2, 32)
    model.merge_and_unload()
    config = make_config("llama", tokens={"embed_tokens": [58]})
    config.trainable_token_indices["embed_tokens"].append(-1)
    with pytest.raises(ValueError, match="must be a list of token ids"):
        get_peft_model(build_model("llama"), config)


def test_a_head_that_is_tied_is_not_trained_whole_as_well(tmp_path) -> None:
    """What TRL asks for where a chat template adds tokens; PEFT's LoRA fails in its first pass."""
    config = make_config("llama", tokens={"embed_tokens": TOKENS}, modules_to_save=["lm_head"])
    base = build_model("llama", tie_word_embeddings=True)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"names lm_head, which is tied to model\.embed_tokens.*with its tokens"):
        model = get_peft_model(base, config)
    train_tokens(model)
    assert config.modules_to_save is None
    assert torch.equal(logits(model.eval(), INPUTS), logits(make_model("llama", tied=True), INPUTS))

    untied = make_config("llama", tokens={"embed_tokens": TOKENS}, modules_to_save=["lm_head"])
    model = get_peft_model(build_model("llama"), untied).eval()
    assert untied.modules_to_save == ["lm_head"]
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    expected = logits(model, INPUTS)
    assert difference(logits(model.merge_and_unload(), INPUTS), expected) < 1e-5


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_a_tied_layer_that_is_trained_whole_is_untied_by_the_merge(tmp_path, whole) -> None:
    model = get_peft_model(
        build_model("llama", tie_word_embeddings=True), make_config("llama", tokens=None, modules_to_save=[whole])
    ).eval()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if f"{whole}.modules_to_save" in n).mul_(2.0)
    expected = logits(model, INPUTS)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(logits(loaded, INPUTS), expected) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_folding_in_place_and_back(tied) -> None:
    model = make_model("llama", tied)
    expected, before = logits(model, INPUTS), rows_of(build_model("llama", tie_word_embeddings=tied), "llama")
    model.merge_adapter()
    assert difference(logits(model, INPUTS), expected) < 1e-5
    model.unmerge_adapter()
    assert difference(logits(model, INPUTS), expected) < 1e-5
    model.merge_adapter()
    assert difference(logits(model.base_model.merge_and_unload(), INPUTS), expected) < 1e-5

    model = make_model("llama", tied)
    model.merge_adapter()
    base = model.unload()
    assert torch.equal(rows_of(base, "llama"), before)
    assert difference(logits(base, INPUTS), logits(build_model("llama", tie_word_embeddings=tied), INPUTS)) < 1e-6


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_merging_for_each_prompts_own_context(context) -> None:
    model = make_model("llama", tied=True, context="prompt")
    expected = logits(model, INPUTS)
    merged = model.merge_and_unload(context=context)
    if context == "prompt":
        assert difference(logits(merged, INPUTS), expected) < 1e-5
    assert not any("token_adapter" in name for name, _ in merged.named_modules())


def add_second(model: PeftModel, tokens) -> None:
    torch.manual_seed(2)
    model.add_adapter("second", make_config("llama", tokens=tokens))
    train_tokens(model, "second", seed=6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_beside_it_that_trains_none(tied) -> None:
    alone = logits(make_model("llama", tied), INPUTS)
    model = make_model("llama", tied)
    add_second(model, None)
    assert torch.equal(logits(model, INPUTS), alone)
    model.set_adapter("second")
    second = logits(model, INPUTS)
    assert difference(second, alone) > 1e-3
    model.merge_adapter()
    assert difference(logits(model, INPUTS), second) < 1e-5
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert difference(logits(merged, INPUTS), second) < 1e-5
    assert torch.equal(rows_of(merged, "llama"), rows_of(build_model("llama"), "llama"))


def test_two_adapters_that_train_different_tokens_are_merged_together() -> None:
    model = make_model("llama", tied=False)
    add_second(model, [57])
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    first = rows_of(make_model("llama", tied=False).merge_and_unload(), "llama")
    changed = (rows_of(merged, "llama") != first).any(1).nonzero().flatten().tolist()
    assert changed == [57]


def test_what_cannot_be_merged_changes_nothing() -> None:
    model = make_model("llama", tied=True)
    add_second(model, [59])
    expected = logits(model, INPUTS)
    with pytest.raises(ValueError, match=r"'default', 'second' train the same tokens of .*embed_tokens.*Merge one"):
        model.merge_and_unload(adapter_names=["default", "second"])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("tokens_delta.second"))[0, 0] = math.nan
    with pytest.raises(ValueError, match="has trained hold NaN or infinity"):
        model.merge_and_unload(adapter_names=["second"], safe_merge=True)
    model.set_adapter("second")
    with pytest.raises(ValueError, match="has trained hold NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    model.set_adapter("default")
    assert torch.equal(logits(model, INPUTS), expected)


@pytest.mark.parametrize("given", ["58", [-1], [1.5], [True], [[1]], {"embed_tokens": 3}, {3: [3]}, {"": [1]}, 7])
def test_a_config_with_other_than_token_ids_is_refused(given) -> None:
    with pytest.raises(ValueError, match=r"EASConfig\(trainable_token_indices=.*must be a list of token ids"):
        EASConfig(trainable_token_indices=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": {"wte": [3]}}, r"'wte' is no embedding of LlamaForCausalLM.*model\.embed_tokens"),
        ({"tokens": {"norm": [3]}}, "'norm' is no embedding"),
        ({"tokens": [VOCAB]}, rf"names token {VOCAB}, but model\.embed_tokens has {VOCAB} rows.*resize_token_embed"),
        ({"modules_to_save": ["embed_tokens"]}, "trains 'embed_tokens' whole, and trainable_token_indices tokens"),
        ({"tokens": {"lm_head": [3]}, "modules_to_save": ["lm_head"]}, "trains 'lm_head' whole"),
    ],
)
def test_a_config_that_does_not_fit_the_model_leaves_it_as_it_was(options, message) -> None:
    model = build_model("llama")
    names, expected = [name for name, _ in model.named_modules()], logits(model, INPUTS)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, make_config("llama", **options))
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model, INPUTS), expected)


@pytest.mark.parametrize(
    ("model_class", "tokens", "message"),
    [
        ("BertForMaskedLM", [3], r"tokens of cls\.predictions\.decoder, whose bias PEFT leaves out.*modules_to_save"),
        ("CLIPModel", [3], r"is a list, but CLIPModel does not tell which is its input embedding. Give a dict"),
    ],
)
def test_models_whose_tokens_cannot_be_trained_so(model_class, tokens, message) -> None:
    model = (
        ARCHITECTURES["clip"].build() if model_class == "CLIPModel" else build_model("bert", model_class=model_class)
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, EASConfig(num_skip=0, trainable_token_indices=tokens))
    assert not any("eas_" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(("first", "second"), [("whole", "tokens"), ("tokens", "whole")])
def test_two_adapters_that_train_one_layer_in_two_ways_are_refused(first, second) -> None:
    options = {"whole": {"tokens": None, "modules_to_save": ["embed_tokens"]}, "tokens": {}}
    model = get_peft_model(build_model("llama"), make_config("llama", **options[first])).eval()
    expected = logits(model, INPUTS)
    with pytest.raises(ValueError, match=r"another adapter of this model trains .*embed_tokens in the other way"):
        model.add_adapter("second", make_config("llama", **options[second]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, INPUTS), expected)
