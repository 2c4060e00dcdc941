"""Merged models that see images, whose text model alone is skipped, in vLLM's backend for transformers' models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from engines import interpreter, seen, vllm_results
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from vllm_models import (
    DECODER,
    GEMMA,
    MIXED,
    SIZES,
    TOKEN_IDS,
    TOKENS,
    WINDOWED,
    Row,
    merge,
    save,
    without,
    word_tokenizer,
)

ENGINE = "vLLM, transformers backend"
NEW = 12
# Image of 4 × 4 patches.
_SIDE = 56
_SQUARE = {"height": _SIDE, "width": _SIDE}
_VISION = {**SIZES, "num_hidden_layers": 2, "image_size": _SIDE, "patch_size": 14}
_SIGLIP = {**_VISION, "vision_use_head": False}


@dataclass(frozen=True, eq=False)
class Family:
    """A model, what makes its processor, the text that transformers is given, and vLLM's if it is another."""

    row: Row
    processor: Callable[[], ProcessorMixin]
    text: str = "w5 w9 <image> w7 w20"
    text_in_vllm: str = ""


def _qwen_config(config_class: type, **vision: Any) -> T.PreTrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    return config_class(
        text_config={**DECODER, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, **vision},
        image_token_id=TOKEN_IDS["<image>"],
        video_token_id=TOKEN_IDS["<video>"],
        vision_start_token_id=TOKEN_IDS["<start>"],
        vision_end_token_id=TOKEN_IDS["<end>"],
    )


def _qwen_processor(processor_class: type) -> ProcessorMixin:
    pytest.importorskip("torchvision")  # for the videos
    image_processor = T.Qwen2VLImageProcessorPil(min_pixels=_SIDE**2, max_pixels=_SIDE**2)
    tokenizer = word_tokenizer(image_token="<image>", video_token="<video>")
    return processor_class(image_processor, tokenizer, T.Qwen2VLVideoProcessor())


def _idefics_config(config_class: type) -> T.PreTrainedConfig:
    return config_class(
        text_config=T.LlamaConfig(**DECODER),
        vision_config=_VISION,
        image_token_id=TOKEN_IDS["<image>"],
        scale_factor=2,
        pad_token_id=0,
    )


# An image in 2 × 2 parts and as a whole, each of which is of four tokens.
_IDEFICS_SIZES = {"size": {"longest_edge": 2 * _SIDE}, "max_image_size": {"longest_edge": _SIDE}}


def _smolvlm_processor() -> ProcessorMixin:
    for package in ("torchvision", "num2words"):  # for the videos
        pytest.importorskip(package)
    image_processor = T.SmolVLMImageProcessorPil(**_IDEFICS_SIZES)
    tokenizer = word_tokenizer(image_token="<image>")
    return T.SmolVLMProcessor(image_processor, tokenizer, T.SmolVLMVideoProcessor(), image_seq_len=4)


FAMILIES = {
    "llava": Family(
        Row(
            "LlavaForConditionalGeneration",
            lambda: T.LlavaConfig(
                text_config=T.LlamaConfig(**DECODER),
                vision_config=T.CLIPVisionConfig(**_VISION),
                image_token_index=TOKEN_IDS["<image>"],
                image_seq_length=16,
            ),
        ),
        lambda: T.LlavaProcessor(
            T.CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=_SQUARE),
            word_tokenizer(image_token="<image>"),
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        ),
    ),
    "qwen2_vl": Family(
        Row(
            "Qwen2VLForConditionalGeneration",
            lambda: _qwen_config(T.Qwen2VLConfig, embed_dim=64, hidden_size=64),
        ),
        lambda: _qwen_processor(T.Qwen2VLProcessor),
        "w5 w9 <start><image><end> w7 w20",
    ),
    "qwen2_5_vl": Family(
        Row(
            "Qwen2_5_VLForConditionalGeneration",
            lambda: _qwen_config(T.Qwen2_5_VLConfig, hidden_size=64, intermediate_size=96, out_hidden_size=64),
        ),
        lambda: _qwen_processor(T.Qwen2_5_VLProcessor),
        "w5 w9 <start><image><end> w7 w20",
    ),
    "idefics3": Family(
        Row("Idefics3ForConditionalGeneration", lambda: _idefics_config(T.Idefics3Config)),
        lambda: T.Idefics3Processor(
            T.Idefics3ImageProcessorPil(**_IDEFICS_SIZES), word_tokenizer(image_token="<image>"), image_seq_len=4
        ),
    ),
}
# What transformers attends to in both directions, vLLM attends to in one on a CPU. By the value of `token_type_ids`
# that has transformers do the same.
CAUSAL = {"gemma3": 0, "paligemma": 1}
ONE_DIRECTION = {
    "gemma3": Family(
        Row(
            "Gemma3ForConditionalGeneration",
            lambda: T.Gemma3Config(
                text_config=T.Gemma3TextConfig(**DECODER, **WINDOWED, layer_types=MIXED),
                vision_config=T.SiglipVisionConfig(**_SIGLIP),
                mm_tokens_per_image=4,
                image_token_index=TOKEN_IDS["<image>"],
                boi_token_index=TOKEN_IDS["<start>"],
                eoi_token_index=TOKEN_IDS["<end>"],
                tie_word_embeddings=False,
            ),
        ),
        lambda: T.Gemma3Processor(
            T.Gemma3ImageProcessorPil(size=_SQUARE),
            word_tokenizer(image_token="<image>", boi_token="<start>", eoi_token="<end>"),
            image_seq_length=4,
        ),
        "w5 w9 <start> w7 w20",
    ),
    "paligemma": Family(
        Row(
            "PaliGemmaForConditionalGeneration",
            lambda: T.PaliGemmaConfig(
                text_config={**DECODER, **GEMMA, "model_type": "gemma"},
                vision_config={**_SIGLIP, "model_type": "siglip_vision_model"},
                image_token_index=TOKEN_IDS["<image>"],
                projection_dim=64,
                hidden_size=64,
                tie_word_embeddings=False,
                **without(TOKENS, "vocab_size"),
            ),
        ),
        lambda: T.PaliGemmaProcessor(
            T.SiglipImageProcessorPil(size=_SQUARE, image_seq_length=16), word_tokenizer(image_token="<image>")
        ),
        "<image> w5 w9 w7 w20",
        "<image><s> w5 w9 w7 w20",  # where transformers' processor puts the beginning
    ),
}
# The stock model, too.
REFUSED = {
    "smolvlm": (
        Family(Row("SmolVLMForConditionalGeneration", lambda: _idefics_config(T.SmolVLMConfig)), _smolvlm_processor),
        "'SmolVLMProcessor' object has no attribute '_get_num_multimodal_tokens'",
    ),
}


def draw(folder: Path) -> list[str]:
    """Two images, as files."""
    files = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 255, (_SIDE, _SIDE, 3), dtype=np.uint8)
        files.append(str(folder / f"{seed}.png"))
        Image.fromarray(pixels).save(files[-1])
    return files


def describe(model: PreTrainedModel, family: Family, images: list[str], **changed: int) -> list[list[int]]:
    """What transformers says to each image; `changed` gives inputs another value."""
    processor, said = family.processor(), []
    for image in images:
        inputs = processor(images=Image.open(image), text=family.text, return_tensors="pt")
        inputs = {**inputs, **{name: torch.full_like(inputs[name], value) for name, value in changed.items()}}
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        said.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    assert said[0] != said[1]
    return said


def in_vllm(models: list[PreTrainedModel], family: Family, images: list[str], folder: Path) -> list[dict[str, Any]]:
    """What vLLM makes of each model: its tokens, or the error."""
    jobs = []
    for number, model in enumerate(models):
        path = save(model, folder / str(number))
        family.processor().save_pretrained(path)
        asked = {"prompts": [family.text_in_vllm or family.text] * len(images), "images": images, "num_tokens": NEW}
        jobs.append({"folder": path, **asked, "options": {"model_impl": "transformers"}})
    return vllm_results(jobs, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_images(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    family, images = FAMILIES[name], draw(tmp_path)
    model = merge(family.row, [0, 2])
    (result,) = in_vllm([model], family, images, tmp_path)
    assert result.get("tokens") == describe(model, family, images), result
    seen(ENGINE, name)


@pytest.mark.parametrize("name", ONE_DIRECTION)
def test_images_that_vllm_attends_to_in_one_direction(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    family, images = ONE_DIRECTION[name], draw(tmp_path)
    models = [family.row.build(), merge(family.row, [0, 2])]
    for model, result in zip(models, in_vllm(models, family, images, tmp_path)):
        said = describe(model, family, images, token_type_ids=CAUSAL[name])
        assert result.get("tokens") == said, result
        assert said != describe(model, family, images)
    seen(ENGINE, f"{name} with images", "The stock model, too, attends to images in one direction only, on a CPU.")


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_vllm_refuses_of_the_stock_model(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    family, reason = REFUSED[name]
    models = [family.row.build(), merge(family.row, [0, 2])]
    for result in in_vllm(models, family, draw(tmp_path), tmp_path):
        assert reason in result["error"]
    seen(ENGINE, name, f'The stock model, too: "… {reason} …".')
