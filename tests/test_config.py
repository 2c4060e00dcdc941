"""Every bad config is refused with what was received, what is allowed and what to do; the model stays as it was."""

import dataclasses
import json
import pydoc
import re

import numpy as np
import pytest
import torch
from conftest import ALL, LAYERS, build_model, logits, make_inputs, mha_names
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser

from peft_eas import EASConfig


def test_defaults_are_the_released_values():
    config = EASConfig()
    assert (config.r, config.attention_r, config.groups, config.scale) == (32, 8, 2, 1.0)
    assert (config.paths, config.router_temperature, config.dropout) == (2, 10.0, 0.1)
    assert (config.context, config.init_weights) == ("prompt", True)
    assert config.num_skip is config.skipped_modules is config.target_modules is config.modules_to_save is None
    assert config.kept_modules is config.exclude_modules is None
    assert config.peft_type == "EAS"


def test_each_field_explains_itself():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(EASConfig):
        if field.name not in inherited:
            assert set(field.metadata) == {"help"}, field.name
            assert field.metadata["help"].endswith("."), field.name


def test_help_shows_each_field_with_its_meaning_in_full():
    text = " ".join(pydoc.render_doc(EASConfig, renderer=pydoc.plaintext).replace("|", " ").split())
    places = []
    for field in dataclasses.fields(EASConfig):
        if "help" in field.metadata:
            meaning = " ".join(field.metadata["help"].replace("|", " ").split())
            found = re.search(rf" {field.name} \([^:]*default {re.escape(repr(field.default))}\): (.*)", text)
            assert found, field.name
            assert found[1].startswith(meaning), field.name
            places.append(found.start())
    assert max(places) < text.index("Raises:")
    assert min(places) > text.index(" Args: ")
    assert "{" not in EASConfig.__doc__


def test_the_argument_parser_shows_each_field_with_its_meaning():
    actions = {action.dest: action.help for action in HfArgumentParser(EASConfig)._actions}
    for field in dataclasses.fields(EASConfig):
        assert actions[field.name].startswith(field.metadata.get("help", "")), field.name


NAN, INF = float("nan"), float("inf")


NAMES = "a list of names of modules, or of their endings, a regular expression over full names, or None"
OUT_OF_RANGE = {
    "an integer of at least 1": {
        "r": [0, -8, 4.0, NAN, "8", None, True, np.bool_(True), [8]],
        "groups": [0, -2, 2.0, "2", None, True],
        "paths": [0, -1, 2.0, "2", None, True],
    },
    "an integer of at least 0": {"attention_r": [-1, -8, 4.0, "8", None, False]},
    "a finite number": {"scale": [NAN, INF, -INF, "1", None, True, 1j, [1]]},
    "a finite number above 0": {"router_temperature": [0, -1.0, NAN, INF, "10", None, True]},
    "in [0, 1)": {"dropout": [-0.1, 1.0, 1.5, NAN, "0.1", None, False]},
    "'prompt', 'running' or 'none'": {"context": ["Prompt", "static", None, 3, ["prompt"], b"prompt"]},
    "an integer of at least 0, or None": {"num_skip": [-1, 1.5, "2", True, NAN, [2]]},
    "a dict from names of MHAs to finite numbers, or None": {
        "scores": [[1.0], {"a": NAN}, {"a": "1"}, {1: 1.0}, {"a": None}, {"a": True}, "a"]
    },
    "True or False": {"init_weights": [1, 0, "no", None, "gaussian"], "context_recorded": [1, "yes", None]},
    "a dict, or None": {"base_shape": [3, [4, 32], "four"]},
    NAMES: {
        "target_modules": [3, True, "", b"self_attn", [""], [3], [None], {"self_attn": 1}],
        "exclude_modules": [3, "", [3], [""], {"self_attn": 1}],
        "kept_modules": [3, "", [3], [""], {"self_attn": 1}],
    },
    "a list of names of modules, or of their endings, or None": {"modules_to_save": ["lm_head", 3, [3], [""], [None]]},
}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        pytest.param(field, value, allowed, id=f"{field}={value!r}")
        for allowed, fields in OUT_OF_RANGE.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_values_out_of_range(field, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"EASConfig({field}={value!r}): {field} must be {allowed}.")):
        EASConfig(**{field: value})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "kept_modules"])
@pytest.mark.parametrize("value", ["[", "*self_attn", "model.(layers", "a{2,1}"])
def test_texts_that_are_no_regular_expressions(field, value):
    message = rf"EASConfig\({field}='{re.escape(value)}'\): .*does not compile \(.*\)\. Correct it, or give a list"
    with pytest.raises(ValueError, match=message):
        EASConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", np.int64(8)),
        ("groups", np.int32(1)),
        ("paths", np.int32(1)),
        ("num_skip", np.uint8(2)),
        ("scale", np.float32(0.5)),
        ("dropout", np.float64(0.25)),
        ("scores", {"a": np.float32(0.5)}),
    ],
)
def test_numbers_of_numpy_are_taken_as_pythons_own(field, value, tmp_path):
    config = EASConfig(**{field: value})
    assert json.dumps(getattr(config, field)) == json.dumps(getattr(value, "item", lambda: {"a": 0.5})())
    config.save_pretrained(tmp_path)
    assert getattr(EASConfig.from_pretrained(tmp_path), field) == value


def test_kept_modules_without_an_adapter_to_keep():
    with pytest.raises(
        ValueError, match=r"attention_r=0\): attention_r must be at least 1 with kept_modules.*exclude"
    ):
        EASConfig(kept_modules=["self_attn"], attention_r=0)


def test_without_a_context_there_is_one_path():
    assert EASConfig(context="none").paths == EASConfig(context="none", paths=1).paths == 1
    message = r"EASConfig\(paths=3\): paths must be left out, or 1, with context='none'"
    with pytest.raises(ValueError, match=message):
        EASConfig(context="none", paths=3)


@pytest.mark.parametrize(("field", "value"), [("r", 9), ("attention_r", 3)])
def test_groups_that_do_not_divide_a_rank(field, value):
    with pytest.raises(ValueError, match=rf"EASConfig\({field}={value}\): {field} must be a multiple of groups=2"):
        EASConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 2),
        ("attention_r", 0),
        ("groups", 1),
        ("paths", 1),
        ("paths", 5),
        ("scale", -2),
        ("scale", 0),
        ("router_temperature", 1),
        ("dropout", 0),
        ("dropout", 0.999),
        ("num_skip", 0),
        ("skipped_modules", []),
        ("skipped_modules", ("a", "b")),
        ("scores", {}),
        ("scores", {"a": 1, "b": -0.5}),
    ],
)
def test_values_at_the_edge_of_the_range(field, value):
    assert getattr(EASConfig(**{field: value}), field) in (value, list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("value", ["model.layers.0.self_attn", [3], [None], ["a", 1], 5, {"a": 1}.values()])
def test_skipped_modules_is_a_list_of_names(value):
    with pytest.raises(ValueError, match=r"skipped_modules=.*: give a list of full module names, or None"):
        EASConfig(skipped_modules=value)


def test_repeated_skipped_modules():
    with pytest.raises(ValueError, match=r"skipped_modules names \['b'\] more than once; name each MHA once"):
        EASConfig(skipped_modules=["a", "b", "c", "b"])


@pytest.mark.parametrize(("num_skip", "names"), [(3, ["a", "b"]), (0, ["a"]), (1, [])])
def test_num_skip_and_skipped_modules_that_contradict_each_other(num_skip, names):
    with pytest.raises(ValueError, match=rf"num_skip={num_skip} contradicts skipped_modules.* names {len(names)}"):
        EASConfig(num_skip=num_skip, skipped_modules=names)


def test_num_skip_and_skipped_modules_that_agree():
    assert EASConfig(num_skip=2, skipped_modules=["a", "b"]).skipped_modules == ["a", "b"]


def test_a_config_is_not_changed_by_its_list_being_changed():
    names = ["a"]
    config = EASConfig(skipped_modules=names)
    names.append("b")
    assert config.skipped_modules == ["a"]


# --- against the model -----------------------------------------------------------------------------------------------


def refused(message, device, family="llama", model=None, error=ValueError, **fields):
    """Asserts that `EASConfig(**fields)` is refused with `message`, and leaves the model as it was."""
    model = model or build_model(family, device)
    inputs = make_inputs(family, device)
    modules, expected = list(model.named_modules()), logits(model, inputs)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = EASConfig(**fields)
    before = config.to_dict()
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert list(model.named_modules()) == modules
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert not model._forward_pre_hooks
    assert torch.equal(logits(model, inputs), expected)
    # Neither has the refused config changed, so that it can be mended and tried again.
    written = {"base_model_name_or_path", "inference_mode", "task_type", "auto_mapping"}  # by PEFT, on entry
    assert {k: v for k, v in config.to_dict().items() if k not in written} == {
        k: v for k, v in before.items() if k not in written
    }
    get_peft_model(model, EASConfig(num_skip=1, context="running"))  # one that fits is accepted


@pytest.mark.parametrize("family", ALL)
def test_num_skip_beyond_the_number_of_mhas(family, device):
    refused(rf"num_skip=5, but th.* model has 4 MHAs.*0 to {LAYERS}", device, family, num_skip=5)


@pytest.mark.parametrize("family", ALL)
def test_num_skip_of_all(family, device):
    model = get_peft_model(build_model(family, device), EASConfig(num_skip=LAYERS))
    assert model.candidates == mha_names(family)


def test_num_skip_beyond_the_number_of_targets(device):
    fields = {"target_modules": r".*layers\.[0-2]\.self_attn", "exclude_modules": ["layers.1.self_attn"]}
    refused("num_skip=3, but th.* model has 2 MHAs", device, num_skip=3, **fields)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.4.self_attn"],
        ["layers.0.self_attn"],
        ["model.layers.0.mlp"],
        ["model.layers.0"],
        ["model.layers.0.self_attn.q_proj"],
        [""],
        ["model.layers.0.self_attn", "nonsense"],
        ["base_model.model.model.layers.0.self_attn"],
    ],
)
def test_skipped_modules_that_do_not_exist(names, device):
    message = rf"skipped_modules names .*{re.escape(names[-1])}.*[Cc]andidates: model.layers.0.self_attn"
    refused(message, device, skipped_modules=names)


def test_skipped_modules_that_are_not_among_the_targets(device):
    names = ["model.layers.0.self_attn"]
    refused(
        r"skipped_modules names .*model.layers.0.self_attn.*cannot be skipped.*andidates: model.layers.1.self_attn",
        device, skipped_modules=names, exclude_modules=names,
    )  # fmt: skip


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["mlp"], "model", r".*mlp", r".*", ["self_attn", "mlp"], ["model.layers.0"], "lm_head"]
)
def test_targets_that_are_no_mhas(targets, device):
    refused(r"target_modules=.*cannot be skipped.*model.layers.0.self_attn.*leave target_modules out", device,
            target_modules=targets)  # fmt: skip


@pytest.mark.parametrize("targets", [["attn"], ["layers.9.self_attn"], r"nothing", ["attention"], ["Self_attn"]])
def test_targets_that_match_nothing(targets, device):
    refused(r"target_modules=.*matches no.*model.layers.0.self_attn.*leave target_modules out", device,
            target_modules=targets)  # fmt: skip


def test_suffix_targets_that_hit_both_towers_are_taken_at_their_word(device):
    model = get_peft_model(build_model("llava", device), EASConfig(target_modules=["self_attn"], num_skip=1))
    assert len(model.candidates) == 2 * LAYERS


def test_vision_tower_on_request(device):
    targets = r".*vision_tower.*self_attn"
    model = get_peft_model(build_model("llava", device), EASConfig(target_modules=targets, num_skip=1))
    assert len(model.candidates) == LAYERS
    assert all("vision_tower" in name for name in model.candidates)


@pytest.mark.parametrize("exclude", [["self_attn"], r".*self_attn", mha_names("llama")])
def test_everything_excluded(exclude, device):
    refused(r"exclude_modules=.*leaves no.* 4 target.*Exclude fewer", device, exclude_modules=exclude)


@pytest.mark.parametrize("exclude", [["layers.0.self_attn", "layers.3.self_attn"], r".*layers\.[03]\.self_attn"])
def test_excluded_mhas_are_not_touched(exclude, device):
    model = build_model("llama", device)
    untouched = model.model.layers[0].self_attn, model.model.layers[0].mlp, model.model.layers[0].input_layernorm
    peft_model = get_peft_model(model, EASConfig(exclude_modules=exclude, num_skip=1))
    assert peft_model.candidates == mha_names("llama", [1, 2])
    assert untouched == (model.model.layers[0].self_attn, model.model.layers[0].mlp,
                         model.model.layers[0].input_layernorm)  # fmt: skip


@pytest.mark.parametrize("exclude", [["nothing.like.it"], r"nothing.like.it"])
def test_excluding_what_is_not_there(exclude, device):
    """Surely a mistake: the user believes that an MHA is safe which is not."""
    refused(r"exclude_modules=.*(matches no|nothing)", device, exclude_modules=exclude)


VISION = [f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(LAYERS)]
TEXT = mha_names("llava")


@pytest.mark.parametrize(
    ("fields", "candidates", "kept"),
    [
        ({"kept_modules": r".*vision_tower.*self_attn"}, TEXT, VISION),
        ({"kept_modules": r".*vision_tower.*"}, TEXT, VISION),
        ({"kept_modules": VISION[1:]}, TEXT, VISION[1:]),
        ({"kept_modules": ["language_model.layers.0.self_attn"]}, TEXT[1:], TEXT[:1]),
        ({"kept_modules": r".*vision_tower.*", "exclude_modules": [VISION[0], TEXT[0]]}, TEXT[1:], VISION[1:]),
        ({"kept_modules": r".*vision_tower.*", "target_modules": ["self_attn"]}, TEXT, VISION),
        ({"kept_modules": r".*vision_tower.*", "target_modules": TEXT[:2]}, TEXT[:2], VISION),
        ({"kept_modules": VISION[:1], "target_modules": r".*\.0\.self_attn"}, TEXT[:1], VISION[:1]),
        ({"kept_modules": [], "target_modules": VISION}, VISION, []),
    ],
)
def test_kept_modules_are_adapted_but_no_candidates(fields, candidates, kept, device, tmp_path):
    model = get_peft_model(build_model("llava", device), EASConfig(**{"num_skip": 1, **fields}))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model("llava", device), tmp_path)
    for one in (model, again):
        assert one.candidates == candidates
        adapted = {name.partition(".eas_")[0] for name, _ in one.named_parameters() if ".eas_input." in name}
        assert {name.removeprefix("base_model.model.") for name in adapted} == {*candidates, *kept}
        number = sum("eas_pia" in name and "token_down.weight" in name for name, _ in one.named_parameters())
        assert number == len(candidates)


def test_keeping_all_is_to_skip_none(device):
    model = get_peft_model(build_model("llama", device), EASConfig(kept_modules=["self_attn"]))
    assert model.candidates == model.skipped_modules == []
    refused(
        r"num_skip=1, but this model has 0 MHAs that may be skipped", device, kept_modules=["self_attn"], num_skip=1
    )


@pytest.mark.parametrize("keep", ["[0-9]+", ["self_atn"], ["self_attn", "mlp"]])
def test_keeping_what_is_not_there(keep, device):
    refused(r"kept_modules=.*matches nothing that could be skipped.*Its? ?MHAs|MHAs of", device, kept_modules=keep)


def test_skipping_what_is_kept(device):
    names = mha_names("llama", [1, 2])
    message = rf"skipped_modules names {re.escape(names[0])}, which kept_modules=.*never skips\. Take it out of one"
    refused(message, device, kept_modules=["layers.1.self_attn"], skipped_modules=names)
    refused("num_skip=4, but this model has 3", device, kept_modules=["layers.1.self_attn"], num_skip=4)


def test_targets_by_list_and_by_expression(device):
    for targets in (["layers.1.self_attn", "model.layers.2.self_attn"], r"model\.layers\.[12]\.self_attn"):
        model = get_peft_model(build_model("llama", device), EASConfig(target_modules=targets, num_skip=1))
        assert model.candidates == mha_names("llama", [1, 2])


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm", "model.layers.2.self_attn"])
def test_modules_to_save_that_are_wrapped(name, device):
    refused(rf"modules_to_save.*{name}.*exclude_modules", device, modules_to_save=["lm_head", name])


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "down_proj", "layers.0", "layers", "model", "attn"])
def test_modules_to_save_inside_or_around_what_is_wrapped(name, device):
    """A copy of a projection is what would be folded into, and a copy of a block would hold wrappers of its own."""
    refused(rf"modules_to_save.*{name}", device, modules_to_save=[name])


def test_modules_to_save_that_does_not_exist(device):
    refused("no_such_head", device, modules_to_save=["no_such_head"])


def test_groups_that_do_not_divide_the_width(device):
    model = build_model("gpt2", device, n_embd=36, n_head=4)
    refused(r"groups=8 does not divide .*36", device, "gpt2", model=model, r=8, attention_r=8, groups=8)


def test_unknown_architecture(device):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.feed_forward = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    message = r"known: .*LlamaDecoderLayer.*repeated blocks of this model: Block.*ARCHITECTURES\[.*mha=.*ffn="
    for fields in ({}, {"target_modules": ["mixer"]}):
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            get_peft_model(model, EASConfig(**fields))
        assert [type(m).__name__ for m in model.modules()][2] == "Block"
        assert "mixer" in dict(model.blocks[0].named_children())


@pytest.mark.parametrize("context", ["prompt", "running", "none"])
def test_an_ffn_in_chunks_is_refused(context, device):
    model = build_model("bert", device, chunk_size_feed_forward=4)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward=4 feeds the FFN a part of the tokens.*Set .* to 0"):
        get_peft_model(model, EASConfig(context=context))
    assert list(model.named_modules()) == modules
