"""Files of released weights: read as tensors alone, so that no code of theirs runs, and CLIP's names in them."""

import re
import warnings
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

# OpenAI's names of CLIP's vision tower, and transformers'.
CLIP_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",  # so it is spelt
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_tensors(path: Path) -> dict[str, Any]:
    """What a PyTorch file holds, with nothing but tensors, plain values and a command line's `Namespace` in it.

    Raises:
        FileNotFoundError, ValueError: if it is not there, not whole, or holds code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Name the file that holds the weights.")
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which holds code. If you trust where it is from, write its weights "
                f"out: torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'clip.pth'), and give clip.pth."
            ) from error
        raise ValueError(
            f"{path} cannot be read as weights alone ({str(error).splitlines()[0]}): it is truncated, no PyTorch "
            "file, or holds other objects than tensors. Download it again, or save its state_dict() to a new file."
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}. Allowed is a dictionary of tensors by name.")
    return held


def clip_vision_weight(name: str, weight: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A weight of OpenAI's vision tower by transformers' names; the packed query, key and value are three."""
    for old, new in CLIP_VISION.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(old)}(?=\.|$)", new, name)
    packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
    if packed is None:
        return [(name, weight)]
    layer, kind = packed.groups()
    parts = zip("qkv", weight.chunk(3), strict=True)
    return [(f"{layer}.self_attn.{letter}_proj.{kind}", part.clone()) for letter, part in parts]
