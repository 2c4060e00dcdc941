"""Every row of the table of architectures, on a tiny model of its family; prints one line per family.

What holds for any architecture (training, resuming, bad input, ...) is tested elsewhere on a few of them.
"""

import inspect
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import difference
from families import ARCHITECTURES, KEYS, SKIPS, SPECIAL_TOKENS, Family, candidates, labelled, make, output, output_r
from hub_metadata import metadata_problems
from peft import PeftModel, get_peft_model
from processes import run_alone
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from peft_eas import ARCHITECTURES as TABLE
from peft_eas import Architecture, EASConfig
from peft_eas.architectures import at_path, find_mhas
from peft_eas.layers import FFNLayer, MHALayer
from peft_eas.reporting.card import PICTURE
from peft_eas.runtime.merged import merged_model_class

NAMES = list(ARCHITECTURES)
MIXTURES = [name for name, family in ARCHITECTURES.items() if "expert" in repr(family.config())]
GENERATING = [name for name, family in ARCHITECTURES.items() if family.kind != "encoder"]
DECODERS = [name for name, family in ARCHITECTURES.items() if family.kind == "decoder"]


def merge(model: PeftModel, context: str) -> PreTrainedModel:
    """The model merged so that it computes what it did."""
    return model.merge_and_unload(context=context)


def calls(model: nn.Module, modules: list[nn.Module], inputs: dict) -> int:
    """How often any of `modules` is called."""
    count = 0

    def add(*_):
        nonlocal count
        count += 1

    handles = [module.register_forward_hook(add) for module in modules]
    output(model, inputs)
    for handle in handles:
        handle.remove()
    return count


def leaves(module: nn.Module) -> list[nn.Module]:
    """What computes anything: the modules with weights of their own."""
    return [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]


@pytest.fixture(autouse=True)
def family_of_the_line(request, record_property):
    """Names the family that a test is counted for."""
    if "name" in request.fixturenames:
        record_property("family", request.getfixturevalue("name"))


SIDES = [(name, False) for name in NAMES] + [(name, True) for name in NAMES if ARCHITECTURES[name].on_request]
IDS = [name + (" (vision)" if on_request else "") for name, on_request in SIDES]
sides = pytest.mark.parametrize(("name", "on_request"), SIDES, ids=IDS)


@sides
def test_finds_its_mhas_and_starts_as_the_base(name, on_request):
    family = ARCHITECTURES[name]
    inputs = family.make_inputs()
    expected = output(family.build(), inputs)
    base = family.build()
    names = candidates(family, on_request)
    rank = output_r(family, on_request)
    config = EASConfig(num_skip=1, target_modules=names, r=8, attention_r=4, output_r=rank)
    model = get_peft_model(base, config).eval()
    assert names
    if not on_request:
        assert len(names) == family.num_candidates
    assert torch.equal(output(model, inputs), expected)
    model.base_model.set_skipped_modules(names)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model.unload(), inputs), expected)


@sides
@pytest.mark.parametrize("skip", SKIPS)
def test_a_new_adapter_is_the_base_without_the_skipped_mhas(name, on_request, skip):
    family = ARCHITECTURES[name]
    inputs = family.make_inputs()
    base, bare = family.build(), family.build()
    names = candidates(family, on_request)
    skipped = SKIPS[skip](names)
    rows = {mha: row for mha, _, row in find_mhas(bare)}
    for mha in skipped:

        def nothing(module, args, kwargs, result, row=rows[mha]):
            z = args[0] if args else kwargs["hidden_states"]
            kept_norm = row.kept_norm and at_path(module, row.kept_norm.removeprefix(f"{row.mha}."))
            update = kept_norm(z) if kept_norm else torch.zeros_like(z)
            return (update, *result[1:]) if isinstance(result, tuple) else update

        bare.get_submodule(mha).register_forward_hook(nothing, with_kwargs=True)
    expected = output(bare, inputs)

    rank = output_r(family, on_request)
    config = EASConfig(skipped_modules=skipped, target_modules=names, r=8, attention_r=4, output_r=rank)
    model = get_peft_model(base, config).eval()
    unused = [leaf for mha in skipped for leaf in leaves(_base_mha(model, mha)) if not _is_norm(leaf)]
    assert difference(output(model, inputs), expected) <= 1e-5
    assert calls(model, unused, inputs) == 0


def _base_mha(model: PeftModel, name: str) -> nn.Module:
    return model.base_model.model.get_submodule(name).base_layer


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


@sides
@pytest.mark.parametrize("skip", ["some", "others", "all"])
@pytest.mark.parametrize("context", ["running", "prompt"])
def test_merge_is_exact_saved_and_reloaded(name, on_request, skip, context, tmp_path, record_property):
    family = ARCHITECTURES[name]
    inputs = family.make_inputs(batch=3, seed=1)
    model = make(family, skip, context, on_request)
    expected = output(model, inputs)
    merged = merge(model, context)
    actual = output(merged, inputs)
    record_property("merge", difference(actual, expected))
    assert difference(actual, expected) <= 1e-5

    merged.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == f"eas_{family.config().model_type}"
    stock = getattr(transformers, family.model_class)
    loaded = merged_model_class(stock).from_pretrained(tmp_path, config=config)
    assert torch.equal(output(loaded.eval(), inputs), actual)
    with pytest.raises(Exception, match="EAS checkpoint"):  # whose class is another in each version
        stock.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "model_class"), [("clip_vision_model", None), ("qwen2", "Qwen2Model"), ("t5", None)])
def test_a_merged_model_hands_out_its_hidden_states(name, model_class):
    """Also one without a head, which is asked for them itself."""
    family = ARCHITECTURES[name]
    family = replace(family, model_class=model_class or family.model_class)
    inputs = {**family.make_inputs(), "output_hidden_states": True}
    model = make(replace(family, kind="encoder"), "some")
    kinds = ("hidden_states",) if name != "t5" else ("encoder_hidden_states", "decoder_hidden_states")
    with torch.no_grad():
        expected, actual = model(**inputs), merge(model, "running")(**inputs)
    for kind in kinds:
        assert len(actual[kind]) == len(expected[kind]) > 1
        assert all(difference(a, e) <= 1e-5 for a, e in zip(actual[kind], expected[kind]))


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("context", ["running", "prompt"])
def test_generates_alike_with_and_without_cache_padding_and_adapters(name, context):
    family = ARCHITECTURES[name]
    model = make(family, "some", context)
    inputs = family.make_inputs(length=9)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if family.kind == "decoder":
        settings["suppress_tokens"] = SPECIAL_TOKENS
    expected = model.generate(**inputs, **settings)
    if not family.model_class.startswith("PaliGemma"):  # which, without a cache, sees its answer in both directions
        assert torch.equal(model.generate(**inputs, **settings, use_cache=False), expected)
    beams = model.generate(**inputs, **settings, num_beams=2)
    merged = merge(model, context)
    assert torch.equal(merged.generate(**inputs, **settings), expected)
    assert torch.equal(merged.generate(**inputs, **settings, num_beams=2), beams)
    if "input_ids" not in inputs:
        return

    text = {"input_ids": inputs["input_ids"].clamp(3, 56), "attention_mask": inputs["attention_mask"]}
    length = text["input_ids"].shape[1]
    # The positions of an encoder are not those of its tokens, so that it is padded on the right.
    sides, start = ((3, 0), length) if family.kind == "decoder" else ((0, 3), 0)
    padded = {key: nn.functional.pad(value, sides) for key, value in text.items()}

    def is_moved(model: nn.Module) -> bool:
        moved = model.generate(**padded, **settings)[:, start and start + 3 :]
        return not torch.equal(moved, model.generate(**text, **settings)[:, start:])

    assert not is_moved(merged) or is_moved(family.build())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("skip", ["some", "all"])
def test_no_answer_token_changes_a_logit_before_it(name, skip):
    family = ARCHITECTURES[name]
    model = make(family, skip, "prompt")
    inputs = labelled(family, family.make_inputs())
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, -3] = changed["labels"][:, -3] = 5
    before, after = (output(model, given)[:, :-3] for given in (inputs, changed))
    # The tokens that one expert computes are one matrix product, whose sums depend on their number.
    assert difference(after, before) <= (1e-5 if name in MIXTURES else 0)


@pytest.mark.parametrize("name", [n for n in GENERATING if n not in DECODERS])
def test_no_answer_token_of_a_decoder_behind_an_encoder_changes_a_logit_before_it(name):
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt")
    inputs = labelled(family, family.make_inputs())
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["labels"][:, 4] = 5
    changed["decoder_input_ids"][:, 5] = 5  # a label is read one token later
    before, after = (output(model, given)[:, :5] for given in (inputs, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", [n for n in NAMES if "input_ids" in ARCHITECTURES[n].make_inputs()])
def test_padding_changes_nothing(name):
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt")
    inputs = family.make_inputs()
    padded = {
        key: nn.functional.pad(value, (0, 3)) if key in ("input_ids", "attention_mask", "mm_token_type_ids") else value
        for key, value in inputs.items()
    }
    base = family.build()

    def change(model: nn.Module) -> float:
        expected, actual = output(model, inputs), output(model, padded)
        if family.kind == "decoder" or "TokenClassification" in family.model_class:
            actual = actual[:, : expected.shape[1]]
        return difference(actual, expected)

    if change(base) > 1e-5:
        pytest.skip("padding changes what the stock model says")
    assert change(model) <= 1e-5


@sides
def test_every_adapter_in_use_learns(name, on_request):
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt", on_request).train()
    result = model(**labelled(family, family.make_inputs()))
    value = next(result[key] for key in ("loss", *KEYS) if result.get(key) is not None)
    value.float().pow(2).sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "bridgetower"])
def test_the_context_of_a_cross_attention_is_what_it_attends_to(name):
    """And the padding of the other side is left out of it."""
    family = ARCHITECTURES[name]
    cross = {mha for mha, _, row in find_mhas(family.build()) if row.is_cross}
    names = [mha for mha in candidates(family, False) if mha in cross]
    config = EASConfig(skipped_modules=names, target_modules=names, r=8, init_weights=False, dropout=0.0)
    model = get_peft_model(family.build(), config).train()
    inputs = labelled(family, family.make_inputs())
    if "attention_mask" in inputs:
        inputs["attention_mask"][:, -4:] = 0
    seen = {}

    def note(mha, args, kwargs):
        states = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
        mask = inputs.get("attention_mask", torch.ones(states.shape[:2]))
        if mask.shape != states.shape[:2]:  # of image tokens, which are never padded
            mask = torch.ones(states.shape[:2])
        seen[mha.candidate.name] = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    layers = [module for module in model.modules() if isinstance(module, MHALayer) and module.candidate.name in names]
    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    output(model, inputs)
    adapters = {
        module.candidate.name: module.eas_pia["default"]
        for module in model.modules()
        if isinstance(module, FFNLayer) and module.candidate.name in names
    }
    assert set(adapters) == set(seen) == set(names)
    for mha, adapter in adapters.items():
        torch.testing.assert_close(adapter.running_context, seen[mha].mean(0), rtol=1e-4, atol=1e-5)


def test_self_and_cross_attention_in_front_of_one_ffn_are_skipped_each_alone():
    family = ARCHITECTURES["bart"]
    inputs = family.make_inputs()
    names = [f"model.decoder.layers.0.{mha}" for mha in ("self_attn", "encoder_attn")]
    outputs = {}
    for skipped in ([], names[:1], names[1:], names):
        config = EASConfig(
            skipped_modules=skipped, target_modules=names, r=8, output_r=4, init_weights=False, dropout=0.0
        )
        torch.manual_seed(1)
        model = get_peft_model(family.build(), config).eval()
        model.base_model.freeze_context()
        expected = output(model, inputs)
        assert model.base_model.skipped_modules == skipped
        outputs[len(outputs)] = expected
        model.merge_adapter()
        assert difference(output(model, inputs), expected) <= 1e-5
        model.unmerge_adapter()
        assert difference(output(model, inputs), expected) <= 1e-5
        assert difference(output(merge(model, "running"), inputs), expected) <= 1e-5
    for first in outputs:
        assert all(difference(outputs[first], outputs[other]) > 1e-2 for other in outputs if other != first)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("t5", "AutoModelForSeq2SeqLM"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("encoder-decoder of two berts", "AutoModelForSeq2SeqLM"),
        ("whisper", "AutoModelForSpeechSeq2Seq"),
        ("vilt", "AutoModelForVisualQuestionAnswering"),
    ],
)
@pytest.mark.usefixtures("pictures")
def test_the_card_names_the_auto_class_that_loads_all_of_the_model(name, auto, tmp_path):
    family = ARCHITECTURES[name]
    merged = merge(make(family, "some"), "running")
    merged.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"{auto}.from_pretrained" in card
    assert metadata_problems(card) == ([], [])
    assert (tmp_path / PICTURE).stat().st_size > 0
    inputs = family.make_inputs()
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs), output(merged, inputs))


@pytest.mark.parametrize(
    "name", ["llama4", "mixtral", "clip", "clip_vision_model", "siglip", "bart", "t5", "qwen2_vl"]
)
def test_a_merged_model_is_loaded_tuned_and_merged_again(name, tmp_path):
    """With other MHAs skipped than before; what the first merge has deleted is no candidate any longer."""
    family = ARCHITECTURES[name]
    inputs = family.make_inputs()
    merge(make(family, "first"), "running").save_pretrained(tmp_path)
    merged_class = merged_model_class(getattr(transformers, family.model_class))
    config = EASConfig(num_skip=1, r=8, attention_r=4, init_weights=False, context="running")
    model = get_peft_model(merged_class.from_pretrained(tmp_path).eval(), config).eval()
    names = model.base_model.candidates
    assert len(names) == family.num_candidates - 1
    model.base_model.set_skipped_modules(names[1::2])
    expected = output(model, inputs)
    again = merge(model, "running")
    actual = output(again, inputs)
    assert difference(actual, expected) <= 1e-5
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(output(merged_class.from_pretrained(tmp_path / "again").eval(), inputs), actual)


def test_a_mixture_of_experts_is_merged_in_place_and_taken_apart_again():
    family = ARCHITECTURES["mixtral"]
    inputs = family.make_inputs()
    model = make(family, "some")
    expected, weights = output(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert difference(output(model, inputs), expected) <= 1e-5
    with model.disable_adapter():
        assert difference(output(model, inputs), output(family.build(), inputs)) <= 1e-5
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name])


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("name", GENERATING)
def test_each_part_that_takes_tokens_finds_the_prompt_when_it_is_called_alone(name, merged):
    """A backbone, a language model inside, a decoder: alone each computes what it does in the whole model."""
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt")
    model = merge(model, "prompt") if merged else model.get_base_model()
    inputs = family.make_inputs()
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    for key in ("attention_mask", "decoder_attention_mask"):
        if key in inputs:
            inputs[key][0, -3:] = 0
    calls = []

    def note(part, args, kwargs, result):
        if part is not model:
            given = {key: value for key, value in kwargs.items() if key != "eas_prompt"}
            calls.append((part, args, given, result.last_hidden_state if "logits" not in result else result.logits))

    handles = [
        part.register_forward_hook(note, with_kwargs=True)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and "input_ids" in inspect.signature(part.forward).parameters
    ]
    output(model, {**inputs, "use_cache": False})
    for handle in handles:
        handle.remove()
    assert calls
    for part, args, kwargs, expected in calls:
        with torch.no_grad():
            result = part(*args, **kwargs)
        assert torch.equal(result.last_hidden_state if "logits" not in result else result.logits, expected)


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_prompt_that_a_block_is_not_given_is_no_other_prompt(merged):
    """Falcon's blocks take no more than they need, so that gradient checkpointing would compute them without it."""
    family = ARCHITECTURES["falcon"]
    model = make(family, "some", "prompt")
    model = (merge(model, "prompt") if merged else model).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    inputs = labelled(family, family.make_inputs())
    with pytest.raises(ValueError, match=r"outside of a forward pass of the whole model.*gradient checkpointing"):
        model(**inputs).loss.backward()
    if not merged:
        model.base_model.freeze_context()
        model(**inputs).loss.backward()


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["encoder-decoder of two berts", "bart"])
def test_a_decoder_inside_is_told_the_prompt_for_gradient_checkpointing(name, reentrant, merged):
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt")
    model = (merge(model, "prompt") if merged else model).train()
    inputs = labelled(family, family.make_inputs())

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    model.enable_input_require_grads()
    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert difference(gradients(), expected) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_several_threads_run_one_model_each_with_its_own_prompt(name):
    family = ARCHITECTURES[name]
    model = make(family, "some", "prompt")
    batches = [family.make_inputs(seed=seed) for seed in range(4)]
    expected = [output(model, batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda i: output(model, batches[i % 4]), range(60)))
    finally:
        sys.setswitchinterval(interval)
    assert max(difference(value, expected[i % 4]) for i, value in enumerate(actual)) <= 1e-5


def test_compiled_blocks_that_are_not_given_the_prompt_know_it_too():
    config = ARCHITECTURES["falcon"].config()
    config.num_hidden_layers = 2  # each takes seconds to compile
    family = replace(ARCHITECTURES["falcon"], config=lambda: config)
    model = make(family, "some", "prompt")
    assert len(model.base_model.skipped_modules) == 1
    inputs = labelled(family, family.make_inputs())
    inputs["attention_mask"][0, -3:] = 0
    expected = output(model, inputs)
    assert difference(output(torch.compile(model, backend="eager"), inputs), expected) <= 1e-5
    assert difference(output(torch.compile(merge(model, "prompt"), backend="eager"), inputs), expected) <= 1e-5


def test_a_cross_attention_that_is_given_nothing_to_attend_to_cannot_be_skipped():
    family = replace(ARCHITECTURES["bart"], model_class="BartForCausalLM", inputs=ARCHITECTURES["llama"].inputs)
    inputs = family.make_inputs()
    names = [f"model.decoder.layers.0.{mha}" for mha in ("self_attn", "encoder_attn")]
    config = EASConfig(skipped_modules=names, target_modules=names, r=8, init_weights=False, context="running")
    model = get_peft_model(family.build(), config).eval()
    with pytest.raises(RuntimeError, match=r"encoder_attn is skipped, but .*no encoder_hidden_states.*exclude_mod"):
        output(model, inputs)
    config = EASConfig(skipped_modules=names[:1], exclude_modules=["encoder_attn"], r=8, init_weights=False)
    model = get_peft_model(family.build(), config).eval()
    expected = output(model, inputs)
    assert difference(output(merge(model, "prompt"), inputs), expected) <= 1e-5


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (lambda: ARCHITECTURES["bridgetower"].build(), r".*resblocks\.\d+\.attn", "BridgeTowerResidualAttention: its"),
        (lambda: transformers.DebertaV2Model(_deberta()), None, "DebertaV2Layer: its key projection also reads"),
    ],
)
def test_what_cannot_be_skipped_is_refused_with_the_reason(build, targets, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build(), EASConfig(num_skip=1, target_modules=targets))


def _deberta() -> transformers.PreTrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.DebertaV2Config(**sizes, vocab_size=61, pos_att_type=["p2c", "c2p"], share_att_key=True)


# --- a family of one's own -----------------------------------------------------------------------------------------


class HouseConfig(transformers.PreTrainedConfig):
    model_type = "eas_test_house"

    def __init__(self, width: int = 32, num_floors: int = 3, **kwargs) -> None:
        self.width, self.num_floors = width, num_floors
        super().__init__(**kwargs)


class Windows(nn.Module):
    """Attention over the neighbours, of one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states, mask):
        q, k, v = self.into(hidden_states).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class HouseFloor(nn.Module):
    """Two attentions, the second in front of the same FFN, which stands beside the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.windows, self.doors = Windows(width), Windows(width)
        self.room = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, hidden_states, mask):
        hidden_states = hidden_states + self.windows(self.norm(hidden_states), mask=mask)
        hidden_states = hidden_states + self.doors(hidden_states, mask=mask)
        return hidden_states + self.room(hidden_states)


class House(transformers.PreTrainedModel):
    config_class = HouseConfig

    def __init__(self, config: HouseConfig) -> None:
        super().__init__(config)
        self.ground = nn.Embedding(61, config.width)
        self.floors = nn.ModuleList([HouseFloor(config.width) for _ in range(config.num_floors)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else attention_mask[:, None].bool()
        hidden_states = self.ground(input_ids)
        for floor in self.floors:
            hidden_states = floor(hidden_states, mask[:, None].squeeze(1))
        return {"logits": hidden_states}


@pytest.fixture
def house(monkeypatch) -> Family:
    row = Architecture(
        mha="windows",
        mha_projections=("windows.into",),
        ffn="room",
        ffn_projections=("room.0",),
        input_norm="norm",
        kind="encoder",
        returns=None,
    )
    doors = replace(row, mha="doors", mha_projections=("doors.into",), input_norm=None)
    monkeypatch.setitem(TABLE, "HouseFloor", (row, doors))
    monkeypatch.setattr(transformers, "House", House, raising=False)
    AutoConfig.register("eas_test_house", HouseConfig, exist_ok=True)
    AutoModel.register(HouseConfig, House, exist_ok=True)
    return Family(HouseConfig, "House", num_candidates=6, kind="encoder")


def test_two_attentions_in_front_of_a_mixture_of_experts_are_refused(monkeypatch):
    row = TABLE["MixtralDecoderLayer"]
    monkeypatch.setitem(TABLE, "MixtralDecoderLayer", (row, replace(row, mha_projections=("self_attn.q_proj",))))
    with pytest.raises(ValueError, match=r"rows of MixtralDecoderLayer .*several MHAs.*'mlp'.*Leave one"):
        get_peft_model(ARCHITECTURES["mixtral"].build(), EASConfig(num_skip=1))


@pytest.mark.parametrize("context", ["running", "prompt"])
@pytest.mark.parametrize("skip", SKIPS)
def test_a_row_is_all_that_a_new_family_needs(house, skip, context, tmp_path):
    inputs = house.make_inputs(batch=3)
    inputs["attention_mask"][0, :3] = 0
    base = output(house.build(), inputs)
    assert len(candidates(house, False)) == house.num_candidates
    new = get_peft_model(house.build(), EASConfig(num_skip=1, r=8, attention_r=4)).eval()
    assert torch.equal(output(new, inputs), base)

    model = make(house, skip, context)
    expected = output(model, inputs)
    assert difference(expected, base) > 1e-2
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), base)
    merged = merge(model, context)
    actual = output(merged, inputs)
    assert difference(actual, expected) <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path).eval(), inputs), actual)


# --- without the package -------------------------------------------------------------------------------------------

_WORKER = """
import json, sys, torch, transformers
for folder in sys.argv[1:]:
    inputs, expected, auto, keys, implementation = torch.load(folder + "/expected.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    actual = next(result[key] for key in keys if result.get(key) is not None)
    assert torch.equal(actual, expected), (folder, (actual - expected).abs().max())
    # A mixture's experts are not computed one by one where the base's are not.
    assert getattr(model.config, "_experts_implementation", None) == implementation
assert not any(name.startswith("peft_eas") for name in sys.modules)
"""


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_checkpoints_of_all_families_load_without_the_package(context, tmp_path):
    folders = []
    for number, family in enumerate(ARCHITECTURES.values()):
        folder = tmp_path / f"{number}"
        merged = merge(make(family, "some", context), context)
        merged.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        autos = [auto for auto, target in config["auto_map"].items() if target.endswith(f".{type(merged).__name__}")]
        inputs = family.make_inputs()
        implementation = getattr(family.build().config, "_experts_implementation", None)
        torch.save((inputs, output(merged, inputs), autos[0], KEYS, implementation), folder / "expected.pt")
        folders.append(str(folder))
    run_alone(_WORKER, *folders, folder=tmp_path)
