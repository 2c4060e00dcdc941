"""Tiny models of every family, and what most tests do with them.

Set PEFT_EAS_TEST_DEVICE to run everything on another device, such as "cuda".
"""

import gc
import importlib.metadata
import os
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_eas import EASConfig

torch.set_num_threads(1)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


# Stock models show the same there.
needs_sound_caches = pytest.mark.skipif(
    _version(transformers.__version__) < (5, 18),
    reason="before transformers 5.18 assisted decoding goes wrong, and a cache that is reset keeps its length",
)
# transformers 5.24 was out before the PEFT that its own methods ask for.
needs_peft_of_transformers = pytest.mark.skipif(
    _version(peft.__version__) < _version(getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.0")),
    reason="transformers' own load_adapter and add_adapter ask for a newer peft than is installed",
)
# Not by its module, which the package `examples` has one of, too.
needs_easy_vqa = pytest.mark.skipif(
    not any(distribution.name == "easy-vqa" for distribution in importlib.metadata.distributions()),
    reason="needs the package easy-vqa (extra `examples`)",
)
transformers.utils.logging.disable_progress_bar()

VOCAB, WIDTH, LAYERS, WINDOW = 61, 32, 4, 6
IMAGE_TOKEN = 60

# Weights are drawn wide, so that attention is sharp and a wrong position, mask or window shows in the logits.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3, **_SPECIAL}
_BLOCKS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_DECODER = {**_COMMON, **_BLOCKS, "num_key_value_heads": 2, "max_position_embeddings": 128}
_GPT2 = {
    **_COMMON,
    **{"n_embd": WIDTH, "n_inner": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_ENCODER = {
    **_COMMON,
    **_BLOCKS,
    **{"max_position_embeddings": 64, "num_labels": 3},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
_VISION = {**_BLOCKS, "image_size": 16, "patch_size": 8, "initializer_range": 0.3}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _llava() -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_DECODER),
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )


# One line per family: what makes its config, and the class with a head that is built from it.
FAMILIES: dict[str, tuple[Callable[[], transformers.PreTrainedConfig], str]] = {
    "llama": (lambda: transformers.LlamaConfig(**_DECODER), "LlamaForCausalLM"),
    "mistral": (lambda: transformers.MistralConfig(**_DECODER, sliding_window=WINDOW), "MistralForCausalLM"),
    "qwen2": (
        lambda: transformers.Qwen2Config(
            **_DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0, layer_types=_MIXED
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen3": (lambda: transformers.Qwen3Config(**_DECODER, head_dim=8), "Qwen3ForCausalLM"),
    "gemma2": (
        lambda: transformers.Gemma2Config(**_DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(
            **_DECODER, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, layer_types=_MIXED
        ),
        "Gemma3ForCausalLM",
    ),
    "gpt2": (lambda: transformers.GPT2Config(**_GPT2), "GPT2LMHeadModel"),
    "llava": (_llava, "LlavaForConditionalGeneration"),
    "bert": (lambda: transformers.BertConfig(**_ENCODER), "BertForSequenceClassification"),
    "vit": (lambda: transformers.ViTConfig(**_VISION, num_labels=3), "ViTForImageClassification"),
}
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"]
ALL = list(FAMILIES)
# Which of the four MHAs are skipped.
SKIPS = {"none": [], "first": [0], "half": [0, 2], "last": [3], "all": [0, 1, 2, 3]}

_MHA_NAMES = {
    "gpt2": "transformer.h.{}.attn",
    "bert": "bert.encoder.layer.{}.attention",
    "vit": "vit.layers.{}.attention",
    "llava": "model.language_model.layers.{}.self_attn",
}
_TASKS = {"bert": "SEQ_CLS", "vit": None}


@pytest.fixture
def pictures() -> None:
    """For tests of a card's picture; see `cards_without_pictures`."""


@pytest.fixture(autouse=True)
def cards_without_pictures(request, monkeypatch) -> None:
    """Cards come as without matplotlib, where a test does not ask for `pictures`.

    A picture takes as long as it takes to merge a tiny model and to save all else of it.
    """

    def no_matplotlib(*_: object) -> None:
        raise ImportError

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("peft_eas.reporting.card.draw_skip_map", no_matplotlib)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run."""
    return os.environ.get("PEFT_EAS_TEST_DEVICE", "cpu")


def mha_names(family: str, layers: list[int] | range = range(LAYERS)) -> list[str]:
    """Full names of the MHAs of `layers` (in Llava: of the text model)."""
    return [_MHA_NAMES.get(family, "model.layers.{}.self_attn").format(i) for i in layers]


def build_model(family: str, device: str = "cpu", model_class: str | None = None, seed: int = 0, **changes):
    """A tiny model of `family` in evaluation mode; the same weights for the same seed. `changes` go to its config."""
    make_config, stock_class = FAMILIES[family]
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class or stock_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms that differ, and biases that are not zero
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(device).eval()


def add_eas(
    model: PreTrainedModel, family: str, skip: list[int], context: str = "prompt", warm: bool = True, **options
) -> PeftModel:
    """Adapters that are not the identity on `model`, with the MHAs of the layers `skip` skipped, in evaluation mode.

    With `warm` the running contexts have seen two batches.
    """
    defaults = {
        "task_type": _TASKS.get(family, "CAUSAL_LM"),
        "skipped_modules": mha_names(family, skip),
        "r": 8,
        "attention_r": 4,
        "dropout": 0.0,
        "init_weights": False,
    }
    config = EASConfig(**{**defaults, **options}, context="none" if context == "none" else "prompt")
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    if warm:
        warm_up(model, family)
    if context == "running":
        model.freeze_context()
    return model.eval()


def make_eas(family: str, device: str, skip: list[int], context: str = "prompt", **options) -> PeftModel:
    """`add_eas` on a new model of `family`."""
    return add_eas(build_model(family, device), family, skip, context, **options)


@torch.no_grad()
def warm_up(model: nn.Module, family: str) -> None:
    """Lets the running contexts see two training batches."""
    model.train()
    for seed in (100, 101):
        inputs = make_inputs(family, next(model.parameters()).device, seed=seed)
        if family in (*DECODERS, "llava"):  # the last four tokens are the answer
            labels = inputs["input_ids"].clone()
            labels[:, :-4] = -100
            inputs["labels"] = labels
        model(**inputs)
    model.eval()


def make_inputs(family: str, device: str | torch.device, batch: int = 2, length: int = 12, seed: int = 0) -> dict:
    """Inputs of `family` without labels or padding."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    if family in ("vit", "llava"):
        inputs["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if family != "vit":
        ids = torch.randint(1, IMAGE_TOKEN, (batch, length), generator=generator)
        if family == "llava":
            ids[:, 1:5] = IMAGE_TOKEN
        inputs["input_ids"] = ids
        inputs["attention_mask"] = torch.ones_like(ids)
    return {name: value.to(device) for name, value in inputs.items()}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What `model` says to `inputs`."""
    output = model(**inputs)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def skip_unless_stock_can(run: Callable[[], object]) -> None:
    """Skips the test where the installed transformers and torch fail at `run`, which has nothing of EAS in it."""
    try:
        run()
    except Exception as error:  # whatever it is, it is not ours
        pytest.skip(f"the stock model fails here as well: {type(error).__name__}: {error}"[:200])


def pytest_collection_finish() -> None:
    """Takes from the garbage collector, which each run of Trainer calls, all that is imported by now."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints one line per family that test_architectures.py ran over."""
    lines: dict[str, dict[str, list]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(getattr(report, "user_properties", ()))  # a skipped module has none
            if "family" in properties and (report.when == "call" or outcome != "passed"):
                line = lines.setdefault(properties["family"], {"outcomes": [], "merges": []})
                line["outcomes"].append(outcome)
                line["merges"] += [properties["merge"]] if "merge" in properties else []
    if lines:
        terminalreporter.section("families, with the largest relative difference between merged and unmerged")
    for family, line in sorted(lines.items()):
        counts = ", ".join(f"{line['outcomes'].count(name)} {name}" for name in dict.fromkeys(line["outcomes"]))
        worst = f"{max(line['merges']):.1e}" if line["merges"] else ""
        terminalreporter.line(f"{family:45} {worst:8}  {counts}")
