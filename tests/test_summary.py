"""What users see of a model: `eas_summary`, `repr`, `print_trainable_parameters`. Numbers are counted by hand."""

import re

import families
import pytest
import torch
from conftest import (
    ALL,
    LAYERS,
    SKIPS,
    VOCAB,
    WIDTH,
    WINDOW,
    add_eas,
    build_model,
    make_eas,
    mha_names,
    needs_peft_of_transformers,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from training import SCHEDULE, make_trainer
from transformers import TrainerCallback

from peft_eas import EASCallback, EASConfig, eas_summary
from peft_eas.architectures import find_mhas
from peft_eas.reporting.provenance import origin

FFN = 48
BIASES = 2 * FFN + WIDTH
TOKENS = 64
# With 4 heads of width 8, two of them for keys and values: queries and output, keys and values.
GROUPED = 2 * WIDTH * WIDTH + 2 * WIDTH * 16
FULL = 4 * WIDTH * WIDTH
LONG, SHORT = 4 * 32 * TOKENS, 4 * 32 * WINDOW
# By family: an MHA's parameters, those saved with it, and the FLOPs of the first and of the second MHA.
BY_HAND = {
    # A norm goes, and the FFN's projections get biases: the two that read PIA, and the one with an output adapter.
    "llama": (GROUPED, GROUPED + 32 - BIASES, 2 * GROUPED + LONG, 2 * GROUPED + LONG),
    "mistral": (GROUPED, GROUPED + 32 - BIASES, 2 * GROUPED + SHORT, 2 * GROUPED + SHORT),
    # Biases of queries, keys and values.
    "qwen2": (GROUPED + 64, GROUPED + 64 + 32 - BIASES, 2 * GROUPED + SHORT, 2 * GROUPED + LONG),
    # Norms of queries and keys.
    "qwen3": (GROUPED + 16, GROUPED + 16 + 32 - BIASES, 2 * GROUPED + LONG, 2 * GROUPED + LONG),
    # A second norm goes.
    "gemma2": (GROUPED, GROUPED + 64 - BIASES, 2 * GROUPED + SHORT, 2 * GROUPED + LONG),
    "gemma3": (GROUPED + 16, GROUPED + 16 + 64 - BIASES, 2 * GROUPED + SHORT, 2 * GROUPED + LONG),
    # Conv1D, queries with keys and values in one; it all has biases.
    "gpt2": (FULL + 4 * 32, FULL + 4 * 32 + 64, 2 * FULL + LONG, 2 * FULL + LONG),
    # The norm inside the MHA stays.
    "bert": (FULL + 4 * 32, FULL + 4 * 32, 2 * FULL + LONG, 2 * FULL + LONG),
    "vit": (FULL + 4 * 32, FULL + 4 * 32 + 64, 2 * FULL + LONG, 2 * FULL + LONG),
    "llava": (GROUPED, GROUPED + 32 - BIASES, 2 * GROUPED + LONG, 2 * GROUPED + LONG),
}
# Of rank 8 and 4, with 2 groups, 2 paths and 2 outputs of the router.
PIA = 2 * (32 * 8 + 8) + 2 * (32 * 4 + 32) + (32 * 2 + 2)
INPUT = (32 * 4 + 4) + 2 * (32 * 2 + 32) + (32 * 2 + 2)
OUTPUT = FFN * 8 + (8 * 32 + 32)
STANDS_IN = PIA + OUTPUT  # for a skipped MHA


def rows_by_name(summary):
    return {row.name: row for row in summary.rows}


def sizes(row):
    return row.parameters, row.saved_parameters, row.saved_flops


# --- eas_summary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_numbers_of_each_mha(family):
    summary = eas_summary(make_eas(family, "cpu", [0], warm=False), TOKENS)
    rows = [rows_by_name(summary)[name] for name in mha_names(family)]
    parameters, saved, first_flops, second_flops = BY_HAND[family]
    assert [row.state for row in rows] == ["skipped", "kept", "kept", "kept"]
    assert [row.adapter_parameters for row in rows] == [STANDS_IN, INPUT, INPUT, INPUT]
    assert sizes(rows[0]) == (parameters, saved, first_flops)
    assert sizes(rows[1]) == (parameters, saved, second_flops)
    assert all(row.score is None for row in rows)


def test_adapters_with_one_path():
    rows = eas_summary(make_eas("llama", "cpu", [0], warm=False, paths=1)).rows
    pia, kept = 2 * (32 * 8 + 8) + (32 * 4 + 32), (32 * 4 + 4) + (32 * 2 + 32)
    assert [row.adapter_parameters for row in rows] == [pia + OUTPUT, kept, kept, kept]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("family", ALL)
def test_the_merged_model_has_the_size_that_was_foretold(family, skip):
    base = build_model(family)
    size = base.num_parameters()
    model = add_eas(base, family, SKIPS[skip], "running")
    before = eas_summary(model, TOKENS)
    assert before.base_parameters == origin(model.base_model, "default")["base_parameters"] == size
    merged = model.merge_and_unload()
    assert size - before.saved_parameters == merged.num_parameters()
    if "eas" not in merged.config.to_dict():  # nothing was skipped, and no bias added
        return
    after = eas_summary(merged, TOKENS)
    assert {row.name for row in after.skipped} == {row.name for row in before.skipped}
    assert [sizes(row) for row in after.rows] == [sizes(row) for row in before.rows]
    assert [row.adapter_parameters for row in after.rows] == [0] * len(after.rows)
    for name in ("base_parameters", "saved_parameters", "base_flops", "saved_flops"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llava"])
def test_a_merged_model_that_keeps_its_adapters(family):
    model = make_eas(family, "cpu", SKIPS["half"])
    base_size = eas_summary(model).base_parameters
    merged = model.merge_and_unload(context="prompt")
    summary = eas_summary(merged, TOKENS)
    assert base_size - summary.saved_parameters == merged.num_parameters()
    rows = [rows_by_name(summary)[name] for name in mha_names(family)]
    assert [row.adapter_parameters for row in rows] == [PIA, INPUT, PIA, INPUT]
    # Two products per token, with 32 × 8 weights each for PIA, and 32 × 4 for a kept MHA's adapter.
    flops = BY_HAND[family][2]
    assert summary.saved_flops == 2 * (flops - 4 * 32 * 8) - 2 * (4 * 32 * 4)


def test_the_whole_model_and_its_table():
    model = make_eas("llama", "cpu", SKIPS["half"], "running")
    model.peft_config["default"].scores = {name: 0.25 * i for i, name in enumerate(mha_names("llama"))}
    summary = eas_summary(model, TOKENS)
    linear = LAYERS * (GROUPED + 3 * WIDTH * FFN) + WIDTH * VOCAB
    assert summary.base_flops == 2 * linear + LAYERS * LONG
    assert summary.base_parameters == linear + VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH
    assert summary.saved_parameters == 2 * (GROUPED + 32 - BIASES) - 2 * (32 + 16 + 16)
    assert str(summary) == "\n".join(
        [
            "MHA                       state      score  parameters  adapter  saved parameters  saved FLOPs/token",
            "----------------------------------------------------------------------------------------------------",
            "model.layers.0.self_attn  skipped  +0.0000       3,072    1,586             2,976             14,336",
            "model.layers.1.self_attn  kept     +0.2500       3,072      390           (2,976)           (14,336)",
            "model.layers.2.self_attn  skipped  +0.5000       3,072    1,586             2,976             14,336",
            "model.layers.3.self_attn  kept     +0.7500       3,072      390           (2,976)           (14,336)",
            "----------------------------------------------------------------------------------------------------",
            "total                     2 of 4                12,288    3,952             5,824             28,672",
            "of the base model                              35.20 %  11.32 %           16.68 %            29.22 %",
            "",
            "Base model: 34,912 parameters, 98,112 FLOPs/token.",
            "Merged: 29,088 parameters, 69,440 FLOPs/token.",
            "FLOPs with 64 tokens to attend to. In parentheses: what skipping one more saves.",
        ]
    )
    assert [row.score for row in eas_summary(model.merge_and_unload()).rows] == [0.0, 0.25, 0.5, 0.75]


def test_what_the_search_found():
    model = make_eas("llama", "cpu", SKIPS["half"], "running")
    config = model.peft_config["default"]
    config.scores = dict(zip(mha_names("llama"), (-0.03, -3.0, -0.01, -0.2)))
    curve = {"num_skip": [0, 1, 2, 3, 4], "increase": [0.0, 0.01, 0.04, 0.24, 3.24], "deviation": [0.001] * 5}
    config.search = {"strategy": "ThompsonSampling", "curve": curve, "measured": None}
    said = (
        "The search (ThompsonSampling) chose 2 of 4 candidates to skip. When it ended, that changed the held-out loss "
        "against nothing skipped by +4.1 ± 0.1 % (expected)."
    )
    before = str(eas_summary(model))
    assert re.search(r"^MHA +state +cost ", before)
    # The mean cost of the first and the third is 0.02.
    for name, cost in zip(mha_names("llama"), (r"\+1\.0 %", r"×19\.7", r"-1\.00 %", r"\+19\.7 %")):
        assert re.search(rf"^{re.escape(name)} +\w+ +{cost} ", before, re.MULTILINE)
    merged = model.merge_and_unload()
    for text in (before, str(eas_summary(merged))):
        assert said in text.splitlines()
        assert "by how much skipping an attention raises the loss, against the mean of those that were chosen." in text
    assert [row.score for row in eas_summary(merged).rows] == [-0.03, -3.0, -0.01, -0.2]


def test_heads_that_are_not_the_models_width():
    """8 heads of 16 write 128, and the output projection reads them."""
    base = build_model("qwen3", num_attention_heads=8, head_dim=16)
    row = eas_summary(add_eas(base, "qwen3", [0], warm=False), TOKENS).rows[0]
    weights = 2 * 32 * 128 + 2 * 32 * 32
    assert row.parameters == weights + 2 * 16
    assert row.saved_flops == 2 * weights + 4 * 128 * TOKENS


def test_the_context_length_counts_but_for_a_sliding_window():
    model = make_eas("gemma2", "cpu", [0, 1], warm=False)
    short, long = eas_summary(model, 4).rows, eas_summary(model, 4096).rows
    assert [row.saved_flops for row in short[:2]] == [2 * GROUPED + 4 * 32 * 4] * 2
    assert [row.saved_flops for row in long[:2]] == [2 * GROUPED + SHORT, 2 * GROUPED + 4 * 32 * 4096]


IMAGE_TOKENS = {
    **{
        "vit": 5,
        "dinov2": 5,
        "clip_vision_model": 5,
        "clip": 5,
        "llava": 5,
        "llava_next": 5,
    },  # 2 × 2 and a class token
    **{"siglip": 4, "paligemma": 4, "smolvlm": 16, "idefics3": 16, "internvl": 17},
    **{"qwen2_vl": None, "qwen2_5_vl": None, "llama": None},  # images of any size, and none
}


@pytest.mark.parametrize("family", IMAGE_TOKENS)
def test_the_tokens_of_an_image_are_the_models_own(family):
    """As many as its vision tower is given in a forward pass."""
    base, expected, seen = families.ARCHITECTURES[family].build().eval(), IMAGE_TOKENS[family], []
    block = next((block for _, block, row in find_mhas(base) if row.kind == "vision"), None)
    if expected is not None:
        look = base.get_submodule(block).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
        with torch.no_grad():
            base(**families.ARCHITECTURES[family].inputs(2, 12, torch.Generator().manual_seed(0)))
        look.remove()
        assert set(seen) == {expected}
    summary = eas_summary(get_peft_model(base, EASConfig(num_skip=1)))
    is_vision_only = all(row.kind == "vision" for *_, row in find_mhas(base))
    assert (summary.image_tokens, summary.context_length) == (expected, expected if is_vision_only else 1024)
    assert eas_summary(get_peft_model(base, EASConfig(num_skip=1), "b"), 16).image_tokens is None


def test_flops_of_an_image_classifier():
    model = make_eas("vit", "cpu", [0], "running", warm=False)
    summary = eas_summary(model)
    assert summary.rows[0].saved_flops == 2 * FULL + 4 * 32 * 5
    assert "FLOPs with 5 tokens to attend to, the model's own number for an image." in str(summary)
    assert "FLOPs with 16 tokens to attend to. In" in str(eas_summary(model, 16))
    assert eas_summary(model.merge_and_unload()).rows[0].saved_flops == 2 * FULL + 4 * 32 * 5


def test_flops_of_a_text_model_that_sees_images():
    summary = eas_summary(make_eas("llava", "cpu", [0], warm=False))
    vision, text = summary.rows[0], summary.rows[4]
    assert (vision.saved_flops, text.saved_flops) == (2 * FULL + 4 * 32 * 5, 2 * GROUPED + 4 * 32 * 1024)
    assert "FLOPs with 1,024 tokens to attend to, and 5 in an image." in str(summary)


def test_the_total_counts_candidates_as_the_card_does(tmp_path):
    model = make_eas("llava", "cpu", [1], "running", exclude_modules=["language_model.layers.0.self_attn"])
    text = str(eas_summary(model))
    assert re.search("^total +1 of 3 ", text, re.MULTILINE)
    assert "The total counts candidates; the other MHAs: 4 no target, 1 excluded." in text
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    text = str(eas_summary(merged))
    assert re.search("^total +1 of 3 ", text, re.MULTILINE)
    assert "The total counts candidates; the other MHAs: 5 no target." in text
    merged.save_pretrained(tmp_path / "merged")
    for kind, fate in (("adapter", "skipped"), ("merged", "deleted")):
        card = (tmp_path / kind / "README.md").read_text()
        assert f"| Attentions {fate} | 1 of 3 |" in card
        assert "| Attentions that were no candidates | 5 more, unchanged |" in card


# --- the other families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["running", "prompt"])
@pytest.mark.parametrize("family", families.ARCHITECTURES)
def test_every_architecture(family, context):
    """Among them mixtures of experts, and several MHAs in front of one FFN."""
    base = families.ARCHITECTURES[family].build()
    size = base.num_parameters()
    config = EASConfig(num_skip=1, r=8, attention_r=4, context=context)
    model = get_peft_model(base, config)
    model.fix_skipped_modules(model.candidates[2:])
    before = eas_summary(model, TOKENS)
    states = {row.name: row.state for row in before.rows if row.state != "no target"}
    assert before.base_parameters == size
    assert states == {name: "skipped" if name in model.skipped_modules else "kept" for name in model.candidates}
    merged = model.merge_and_unload(context=None if context == "running" else "prompt")
    after = eas_summary(merged, TOKENS)
    assert size - after.saved_parameters == merged.num_parameters()
    assert {row.name for row in after.skipped} == {row.name for row in before.skipped}
    assert after.base_flops == before.base_flops
    if context == "running":
        assert size - before.saved_parameters == merged.num_parameters()
        assert after.saved_flops == before.saved_flops


def test_of_a_mixtures_experts_those_that_a_token_is_given_to():
    base = families.ARCHITECTURES["mixtral"].build()
    config = base.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (4, 2, FFN)
    summary = eas_summary(get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=1)), TOKENS)
    assert summary.base_flops == 2 * (LAYERS * (GROUPED + 2 * 3 * WIDTH * FFN) + VOCAB * WIDTH) + LAYERS * LONG
    # A norm goes, and one vector in front of the experts comes.
    assert summary.rows[0].saved_parameters == GROUPED + 32 - 32


def test_what_is_no_target():
    names = mha_names("llava")
    model = add_eas(build_model("llava"), "llava", [0], exclude_modules=[names[3]], warm=False)
    summary = eas_summary(model, TOKENS)
    assert [row.state for row in summary.rows] == ["no target"] * 4 + ["skipped", "kept", "kept", "excluded"]
    assert [row.adapter_parameters for row in summary.rows] == [0] * 4 + [STANDS_IN, INPUT, INPUT, 0]
    # The tokens of the vision tower are others than those of the text model.
    linear = LAYERS * (GROUPED + 3 * WIDTH * FFN) + WIDTH * VOCAB + 2 * WIDTH * WIDTH
    assert summary.base_flops == 2 * linear + LAYERS * LONG
    warm = add_eas(build_model("llava"), "llava", [0], "running", exclude_modules=[names[3]])
    merged = eas_summary(warm.merge_and_unload(), TOKENS)
    assert [row.state for row in merged.rows] == ["no target"] * 4 + ["deleted", "kept", "kept", "no target"]


def test_what_is_never_skipped_is_kept():
    options = {"kept_modules": r".*vision_tower.*"}
    model = add_eas(build_model("llava"), "llava", [0], "running", **options)
    summary = eas_summary(model, TOKENS)
    assert [row.state for row in summary.rows] == ["never skipped"] * 4 + ["skipped", "kept", "kept", "kept"]
    assert [row.adapter_parameters for row in summary.rows] == [INPUT] * 4 + [STANDS_IN, INPUT, INPUT, INPUT]
    # It is no candidate, and its tokens are others than those of the text model.
    assert summary.base_flops == eas_summary(make_eas("llava", "cpu", [0], warm=False), TOKENS).base_flops
    size, merged = summary.base_parameters, model.merge_and_unload()
    assert size - summary.saved_parameters == merged.num_parameters()
    after = eas_summary(merged, TOKENS)
    assert [row.state for row in after.rows] == ["never skipped"] * 4 + ["deleted", "kept", "kept", "kept"]
    assert (after.base_flops, after.saved_parameters) == (summary.base_flops, summary.saved_parameters)


def test_the_active_adapter_counts():
    model = make_eas("llama", "cpu", [0], warm=False)
    second = EASConfig(task_type="CAUSAL_LM", skipped_modules=mha_names("llama", [2, 3]), r=16, attention_r=0)
    model.add_adapter("second", second)
    assert [row.state for row in eas_summary(model).rows] == ["skipped", "kept", "kept", "kept"]
    model.set_adapter("second")
    rows = eas_summary(model).rows
    assert [row.state for row in rows] == ["kept", "kept", "skipped", "skipped"]
    assert [row.adapter_parameters > 0 for row in rows] == [False, False, True, True]
    assert eas_summary(model.base_model) == eas_summary(model) == eas_summary(model.get_base_model())


@needs_peft_of_transformers
def test_a_model_that_transformers_has_put_the_adapters_into():
    model = build_model("llama")
    model.add_adapter(EASConfig(skipped_modules=mha_names("llama", [1])))
    assert [row.state for row in eas_summary(model).rows] == ["kept", "skipped", "kept", "kept"]


def test_adapters_that_are_folded_in_place_count_as_before():
    model = make_eas("llama", "cpu", SKIPS["half"], "running")
    before = eas_summary(model)
    model.merge_adapter()
    assert eas_summary(model) == before
    assert origin(model.base_model, "default")["base_parameters"] == before.base_parameters


def test_a_head_that_is_trained_counts_once():
    options = {"num_skip": 1, "skipped_modules": None, "warm": False}
    without = eas_summary(add_eas(build_model("llama"), "llama", [], **options))
    assert without == eas_summary(add_eas(build_model("llama"), "llama", [], modules_to_save=["lm_head"], **options))


def test_new_adapters_on_a_merged_model():
    base = make_eas("llama", "cpu", [0, 2], "running").merge_and_unload()
    size = base.num_parameters()
    names = mha_names("llama", [3])
    model = add_eas(base, "llama", [], "running", skipped_modules=names)
    summary = eas_summary(model)
    assert [row.state for row in summary.rows] == ["deleted", "kept", "deleted", "skipped"]
    assert sizes(summary.rows[0]) == (0, 0, 0)
    assert summary.base_parameters == size
    merged = model.merge_and_unload()
    assert size - summary.saved_parameters == merged.num_parameters()
    assert [row.state for row in eas_summary(merged).rows] == ["deleted", "kept", "deleted", "deleted"]


def test_scores_of_a_search_that_goes_on(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen[state.global_step] = [row.score for row in eas_summary(model).rows], model.peft_config["default"]

    callback = EASCallback(**SCHEDULE)
    trainer = make_trainer(tmp_path, callback, max_steps=16)
    trainer.add_callback(Look())
    trainer.train()
    assert seen[5][0] == [None] * LAYERS  # before the first round
    assert all(isinstance(score, float) for score in seen[6][0])
    assert seen[6][0] != seen[12][0] == callback.record["strategy"]["scores"]
    assert [row.score for row in eas_summary(trainer.model).rows] == seen[12][0]


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_a_context_length_that_is_none(value):
    with pytest.raises(ValueError, match=r"context_length=.*must be an integer of at least 1"):
        eas_summary(make_eas("llama", "cpu", [0], warm=False), context_length=value)


@pytest.mark.parametrize("kind", ["base", "lora", "module"])
def test_a_model_without_eas(kind):
    model = {
        "base": lambda: build_model("llama"),
        "lora": lambda: get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])),
        "module": lambda: nn.Linear(2, 2),
    }[kind]()
    with pytest.raises(
        TypeError, match=rf"was given a {type(model).__name__} without EAS adapters.*Give it the model"
    ):
        eas_summary(model)


# --- repr ------------------------------------------------------------------------------------------------------------


def test_repr_shows_the_skip_set():
    model = make_eas("llama", "cpu", [0], warm=False)
    model.add_adapter("second", EASConfig(task_type="CAUSAL_LM", skipped_modules=mha_names("llama", [0, 1])))
    blocks = [repr(block) for block in model.get_base_model().model.layers]
    for part in ("(self_attn): MHALayer", "(mlp): FFNLayer", "(input_layernorm): NormLayer"):
        assert f"  {part}(\n    MHA skipped by ['default', 'second']\n" in blocks[0]
        assert f"  {part}(\n    MHA skipped by ['second']\n" in blocks[1]
        assert f"  {part}(\n    MHA kept\n" in blocks[2]


def test_repr_of_a_merged_model():
    merged = make_eas("llama", "cpu", [0], "running").merge_and_unload()
    lines = [line.strip() for line in repr(merged).splitlines() if "self_attn" in line or "DecoderLayer" in line]
    kept = ["(1-3): 3 x LlamaDecoderLayer(", "(self_attn): LlamaAttention("]
    assert lines == ["(0): LlamaDecoderLayer(", "(self_attn): SkippedMHA(deleted)", *kept]
    bert = make_eas("bert", "cpu", [0], "running").merge_and_unload()
    assert "(attention): SkippedMHA(deleted but for output.LayerNorm)\n" in repr(bert)


# --- print_trainable_parameters --------------------------------------------------------------------------------------


def printed(model, capsys):
    """(trainable, all, percentage) as PEFT prints them."""
    capsys.readouterr()
    model.print_trainable_parameters()
    parts = capsys.readouterr().out.strip().replace(",", "").split(" || ")
    return tuple(float(part.split(":")[1]) for part in parts)


def check_printed(model, capsys, trainable, everything):
    share = round(100 * trainable / everything, 4)
    assert printed(model, capsys) == (trainable, everything, share)
    assert model.get_nb_trainable_parameters() == (trainable, everything)


SIZE = 34_912  # of the tiny llama


def test_trainable_parameters_before_and_after_the_skip_set_is_fixed(capsys):
    model = add_eas(build_model("llama"), "llama", [], num_skip=2, skipped_modules=None, warm=False)
    check_printed(model, capsys, LAYERS * (STANDS_IN + INPUT), SIZE + LAYERS * (STANDS_IN + INPUT))
    model.set_skipped_modules(mha_names("llama", [1]))  # moves no weights
    check_printed(model, capsys, LAYERS * (STANDS_IN + INPUT), SIZE + LAYERS * (STANDS_IN + INPUT))
    model.fix_skipped_modules(mha_names("llama", [0, 2]))
    check_printed(model, capsys, 2 * (STANDS_IN + INPUT), SIZE + 2 * (STANDS_IN + INPUT))


def test_trainable_parameters_with_modules_to_save(capsys):
    model = add_eas(build_model("llama"), "llama", [0], modules_to_save=["lm_head"], warm=False)
    trained = STANDS_IN + 3 * INPUT + VOCAB * WIDTH
    check_printed(model, capsys, trained, SIZE + trained)


def test_trainable_parameters_of_several_adapters(capsys):
    model = make_eas("llama", "cpu", [0], warm=False)
    second = {"r": 8, "attention_r": 0, "skipped_modules": mha_names("llama", [1, 2])}
    model.add_adapter("second", EASConfig(task_type="CAUSAL_LM", **second))
    first, everything = STANDS_IN + 3 * INPUT, SIZE + STANDS_IN + 3 * INPUT + 2 * STANDS_IN
    check_printed(model, capsys, first, everything)
    model.set_adapter("second")
    check_printed(model, capsys, 2 * STANDS_IN, everything)
    model.delete_adapter("default")
    check_printed(model, capsys, 2 * STANDS_IN, SIZE + 2 * STANDS_IN)


class Params4bit(nn.Parameter):
    """Packed as bitsandbytes' parameter of that name is: two numbers in a byte."""


def test_trainable_parameters_over_a_base_in_four_bits(capsys):
    base = build_model("llama")
    for block in base.model.layers:
        for linear in (block.self_attn.q_proj, block.mlp.up_proj):
            packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
            linear.weight = Params4bit(packed, requires_grad=False)
    model = add_eas(base, "llama", [0], warm=False)
    check_printed(model, capsys, STANDS_IN + 3 * INPUT, SIZE + STANDS_IN + 3 * INPUT)
    assert sizes(eas_summary(model, TOKENS).rows[0]) == BY_HAND["llama"][:3]
    assert eas_summary(model).base_parameters == origin(model.base_model, "default")["base_parameters"] == SIZE
