"""How many tokens an image is for a model, where every image has the same size."""

import math

from torch import nn

# Parameters of a vision tower's embeddings: tokens beside the patches, each as wide as the model.
_MORE_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


def image_tokens(model: nn.Module, block_name: str) -> int | None:
    """Tokens of an image in the vision tower around a block, by image_size and patch_size of its config, or None.

    Counts one token per patch, and those that the embeddings hold beside, such as a class token.
    """
    while block_name:
        block_name = block_name.rpartition(".")[0]
        tower = model.get_submodule(block_name)
        embeddings, config = getattr(tower, "embeddings", None), getattr(tower, "config", None)
        sizes = [_pair(getattr(config, name, None)) for name in ("image_size", "patch_size")]
        if embeddings is not None and all(sizes):
            more = (getattr(embeddings, name, None) for name in _MORE_TOKENS)
            patches = math.prod(image // patch for image, patch in zip(*sizes))
            return patches + sum(tokens.numel() // tokens.shape[-1] for tokens in more if tokens is not None)
    return None


def _pair(size: object) -> tuple[int, int] | None:
    """Height and width."""
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None
