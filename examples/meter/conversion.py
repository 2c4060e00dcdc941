"""Checkpoints of the released METER (https://github.com/zdou0830/METER), with CLIP and RoBERTa, as models of ours.

The released names stay but for the encoders: `vit_model.visual` has OpenAI's names of CLIP, with query, key and value
in one projection, and `text_transformer` is a RoBERTa. What the released model holds and never reads is left out: the
text parts of CLIP beside `vit_model.visual`, RoBERTa's pooler, and the positions' numbers.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, RobertaConfig

from examples.meter.modeling_meter import (
    MeterConfig,
    MeterForImagesAndTextClassification,
    MeterForImageTextRetrieval,
    MeterForPreTraining,
    MeterForVisualQuestionAnswering,
    MeterModel,
    MeterPreTrainedModel,
)
from examples.shared.released_files import clip_vision_weight, load_tensors

# By the head that tells them apart, in this order; a checkpoint without any is the body alone.
MODELS: dict[str, type[MeterPreTrainedModel]] = {
    "vqa_classifier": MeterForVisualQuestionAnswering,
    "nlvr2_classifier": MeterForImagesAndTextClassification,
    "rank_output": MeterForImageTextRetrieval,
    "mlm_score": MeterForPreTraining,
}
HEADS = (*MODELS, "itm_score")
UNUSED = re.compile(
    r"vit_model\.(token_embedding|positional_embedding|ln_final)\b|text_transformer\.pooler\.|.*\.position_ids$"
)
HEAD_SIZE = 64


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file of PyTorch (Lightning), by their released names.

    Raises:
        FileNotFoundError, ValueError: if the file is not there, holds anything that could run code, or no weights.
    """
    content = load_tensors(Path(path))
    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights by name, or other things among them. Give a checkpoint of METER.")
    return state


def infer_config(state: dict[str, Tensor], head_size: int = HEAD_SIZE) -> MeterConfig:
    """The configuration of the model that `state`, with the released names, is of.

    Args:
        head_size: of every attention, which the weights do not tell.

    Raises:
        ValueError: for a METER with other encoders, and for missing weights.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(
                f"The checkpoint has no {name}. Give one of METER with CLIP and RoBERTa; it has "
                f"{', '.join(list(state)[:3])}, …"
            )
        return state[name].shape

    def count(pattern: str) -> int:
        return len({match[0] for name in state if (match := re.match(pattern, name))})

    vision, text = "vit_model.visual", "text_transformer"
    vision_width, _, patch_size, _ = shape(f"{vision}.conv1.weight")
    num_patches = shape(f"{vision}.positional_embedding")[0] - 1
    vocab_size, text_width = shape(f"{text}.embeddings.word_embeddings.weight")
    type_vocab_size = shape(f"{text}.embeddings.token_type_embeddings.weight")[0]
    if type_vocab_size != 1:
        raise ValueError(
            f"The checkpoint's text encoder has {type_vocab_size} token types, so it is a BERT. Give one of METER "
            "with RoBERTa, which has one."
        )
    width = shape("cross_modal_text_transform.weight")[0]
    if any(size % head_size for size in (vision_width, text_width, width)):
        raise ValueError(
            f"The checkpoint's widths {vision_width}, {text_width} and {width} (vision, text, both) are not multiples "
            f"of head_size={head_size}. Give the head size that it was trained with."
        )
    classifiers = [state[name] for name in ("vqa_classifier.3.bias", "nlvr2_classifier.3.bias") if name in state]
    return MeterConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=shape(f"{vision}.transformer.resblocks.0.mlp.c_fc.weight")[0],
            num_hidden_layers=count(rf"{vision}\.transformer\.resblocks\.\d+\."),
            num_attention_heads=vision_width // head_size,
            patch_size=patch_size,
            image_size=patch_size * round(num_patches**0.5),
        ),
        text_config=RobertaConfig(
            vocab_size=vocab_size,
            hidden_size=text_width,
            intermediate_size=shape(f"{text}.encoder.layer.0.intermediate.dense.weight")[0],
            num_hidden_layers=count(rf"{text}\.encoder\.layer\.\d+\."),
            num_attention_heads=text_width // head_size,
            max_position_embeddings=shape(f"{text}.embeddings.position_embeddings.weight")[0],
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        hidden_size=width,
        num_cross_layers=count(r"cross_modal_text_layers\.\d+\."),
        num_attention_heads=width // head_size,
        intermediate_size=shape("cross_modal_text_layers.0.intermediate.dense.weight")[0],
        type_vocab_size=shape("token_type_embeddings.weight")[0],
        num_labels=len(classifiers[0]) if classifiers else 2,
    )


def convert_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under our names; those of the body behind `prefix`. What is never read is left out."""
    converted = {}
    for name, weight in state.items():
        if UNUSED.match(name):
            continue
        if name.startswith("vit_model.visual."):
            parts = clip_vision_weight(name.removeprefix("vit_model.visual."), weight)
            converted |= {f"{prefix}vision_model.{new}": part for new, part in parts}
        elif name.split(".")[0] in HEADS:
            converted[name] = weight
        else:
            converted[prefix + re.sub(r"^text_transformer\.", "text_model.", name)] = weight
    return converted


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Embeddings of the positions, (1 + n², width), for `grid` × `grid` patches, as METER interpolates them."""
    first, rest = positions[:1], positions[1:]
    before = round(len(rest) ** 0.5)
    square = rest.T.reshape(1, -1, before, before)
    return torch.cat([first, nn.functional.interpolate(square, size=(grid, grid), mode="bicubic")[0].flatten(1).T])


def convert(
    state: dict[str, Tensor], image_size: int | None = None, pairs: bool = False, head_size: int = HEAD_SIZE
) -> MeterPreTrainedModel:
    """The model that `state`, with the released names, is of; which one, its heads tell.

    Args:
        image_size: in pixels, if other than the checkpoint's; the positions are interpolated.
        pairs: give the second image of a pair a token type, a copy of the first one's, if it has none.
        head_size: see `infer_config`.

    Raises:
        ValueError: for weights that are missing, unknown or of another shape, and an image size that does not fit.
    """
    config = infer_config(state, head_size)
    state = dict(state)
    vision = config.vision_config
    if image_size is not None and image_size != vision.image_size:
        if image_size <= 0 or image_size % vision.patch_size:
            raise ValueError(f"image_size={image_size}: give a multiple of the patches' {vision.patch_size} pixels.")
        vision.image_size = image_size
        key = "vit_model.visual.positional_embedding"
        state[key] = resize_positions(state[key], image_size // vision.patch_size)
    if pairs and config.type_vocab_size == 2:
        config.type_vocab_size = 3
        state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"][[0, 1, 1]]
    roots = {name.split(".")[0] for name in state}
    model_class = next((known for head, known in MODELS.items() if head in roots), MeterModel)
    model = model_class(config)
    converted = convert_names(state, "" if model_class is MeterModel else f"{model.base_model_prefix}.")
    _check(converted, model)
    model.load_state_dict(converted)
    return model.eval()


def _check(converted: dict[str, Tensor], model: MeterPreTrainedModel) -> None:
    expected = model.state_dict()
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "unexpected": sorted(converted.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(converted[name].shape)} for {tuple(weight.shape)}"
            for name, weight in expected.items()
            if name in converted and converted[name].shape != weight.shape
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{kind} ({len(names)}): {', '.join(names[:5])}" for kind, names in faults.items() if names)
        raise ValueError(
            f"The checkpoint does not fit {type(model).__name__}: {text}. Give a whole checkpoint of METER with CLIP "
            f"and RoBERTa, with the heads of one of {', '.join(MODELS)}, or none."
        )
