"""The models that examples.benchmark compares, all built around the weights of one base.

A variant is a copy of the base's modules whose parameters lie in the base's own storage. Only what a merge changes is
copied (for Llama-2-7B with 12 attentions skipped: 4 GB of 13.5), so that all of them fit beside each other.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from examples.shared.smollm2 import load_smollm2
from peft_eas import EASConfig
from peft_eas.architectures import default_targets, find_mhas

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "160m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SMOLLM2 = "smollm2"

# --- the base --------------------------------------------------------------------------------------------------------


def load_base(model: str | None, shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The base in evaluation mode: a checkpoint, a folder with nothing but a config (random weights), or a shape."""
    if model == SMOLLM2:
        base = load_smollm2(dtype)[0]
    elif model is None or _has_only_config(model):
        config = AutoConfig.from_pretrained(model) if model else LlamaConfig(vocab_size=32000, **SHAPES[shape])
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):  # drawn where they stay
                base = _class_of(config)(config)
        finally:
            torch.set_default_dtype(before)
    else:
        config = AutoConfig.from_pretrained(model)
        base = _class_of(config).from_pretrained(model, dtype=dtype)
    return base.to(device).eval().requires_grad_(False)


def _has_only_config(model: str) -> bool:
    return Path(model).is_dir() and not any(Path(model).glob("*.safetensors")) and not any(Path(model).glob("*.bin"))


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = config.architectures or [LlamaForCausalLM.__name__]
    return getattr(transformers, names[0], None) or AutoModelForCausalLM._model_mapping[type(config)]


def choose_skipped(base: PreTrainedModel, num_skip: int) -> list[str]:
    """Full names of `num_skip` MHAs in the middle of the model; for speed and size it does not matter which."""
    names = default_targets(base)
    if not 0 <= num_skip <= len(names):
        raise SystemExit(f"--num-skip {num_skip}: the model has {len(names)} attentions that may be skipped.")
    start = (len(names) - num_skip) // 2
    return names[start : start + num_skip]


# --- sharing weights -------------------------------------------------------------------------------------------------


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose parameters and buffers lie in the storage of `model`'s."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def own(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Gives the modules `names` of `model` their own storage, before something is folded into them in place."""
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = parameter.data.clone()


# --- the variants ----------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """What the variants are built from.

    Attributes:
        base: the base model. skipped: full names of the MHAs that the EAS variants and the limit do without.
        r, attention_r: ranks of the adapters of skipped and of kept MHAs. seed: seed of the adapters' weights.
    """

    base: PreTrainedModel
    skipped: list[str] = field(default_factory=list)
    r: int = 32
    attention_r: int = 8
    seed: int = 0


def _projections(recipe: Recipe, context: str = "running") -> list[str]:
    """Full names of the projections into which EAS, merged with a context, folds its adapters."""
    names = []
    for mha, block, row in find_mhas(recipe.base):
        is_skipped = mha in recipe.skipped
        paths = [row.output_projection] if is_skipped and row.output_projection else []
        if context == "running" and mha in default_targets(recipe.base) and (is_skipped or recipe.attention_r):
            paths += row.ffn_projections if is_skipped else row.mha_projections
        names += [f"{block}.{path}" for path in paths]
    return names


def adapted(
    recipe: Recipe, skipped: list[str], context: str = "running", identity: bool = False, own_targets: bool = False
) -> PeftModel:
    """EAS adapters with random weights and contexts on the base, unmerged; with `identity` they change nothing."""
    config = EASConfig(
        task_type="CAUSAL_LM",
        skipped_modules=skipped,
        r=recipe.r,
        attention_r=recipe.attention_r,
        context=context,
        init_weights=identity,
    )
    model = share(recipe.base)
    if own_targets:
        own(model, _projections(recipe, context))
    torch.manual_seed(recipe.seed)
    model = get_peft_model(model, config).eval().requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_context"):
            tensor.copy_(torch.randn(tensor.shape))  # drawn on the CPU: the same on every device
        elif ".eas_" in name and tensor.is_floating_point():
            tensor.mul_(0.3)  # deep models of random weights magnify what an adapter changes
    return model


def merged(recipe: Recipe, context: str | None = None, identity: bool = False) -> PreTrainedModel:
    """EAS merged: with `context="prompt"` its adapters go on reading each prompt, else everything is folded."""
    model = adapted(recipe, recipe.skipped, context or "running", identity, own_targets=True)
    return model.merge_and_unload() if context is None else model.merge_and_unload(context=context)


def lora_merged(recipe: Recipe) -> PreTrainedModel:
    """LoRA of rank 8 on the queries and values, merged: the usual way, as fast as the base."""
    targets = [
        f"{block}.{path}"
        for mha, block, row in find_mhas(recipe.base)
        for path in row.mha_projections
        if mha in default_targets(recipe.base) and path.rpartition(".")[2] in ("q_proj", "v_proj", "c_attn")
    ]
    model = share(recipe.base)
    own(model, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # for Conv1D PEFT sets it itself
        return get_peft_model(model, LoraConfig(r=8, target_modules=targets)).eval().merge_and_unload()


class AttentionFreeBlock(nn.Module):
    """y = x + FFN(norm(x)), and nothing else: what a skipped block costs at the least."""

    def __init__(self, block: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        # Of Gemma, of GPT-2, of Llama and its like.
        norms = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")
        self.norm = next(getattr(block, name) for name in norms if hasattr(block, name))
        has_norm_behind = hasattr(block, "post_feedforward_layernorm")
        self.ffn = nn.Sequential(ffn, block.post_feedforward_layernorm) if has_norm_behind else ffn

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return hidden_states + self.ffn(self.norm(hidden_states))


def _limit_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class without the attentions that the config names under `attention_free`."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        take_attention_out(self, config.attention_free)

    return type(f"Limit{stock.__name__}", (stock,), {"__init__": __init__, "__module__": stock.__module__})


def take_attention_out(model: PreTrainedModel, skipped: list[str]) -> None:
    """Puts `AttentionFreeBlock`s in the place of the blocks of the MHAs `skipped`; the kept ones count from 0."""
    kept: list[int] = []
    for mha, block, row in list(find_mhas(model)):
        attention, layer = model.get_submodule(mha), model.get_submodule(block)
        if mha in skipped:
            model.set_submodule(block, AttentionFreeBlock(layer, layer.get_submodule(row.ffn)))
        elif row.kind == "decoder":
            kept.append(attention.layer_idx)
            attention.layer_idx = len(kept) - 1
    model.config.kept_attentions = kept


def limit(recipe: Recipe) -> PreTrainedModel:
    """What no method can beat: the architecture written without the attentions, with the base's weights.

    It owns what a merged model owns, so that neither finds more weights in the processor's cache than the other.
    """
    model = share(recipe.base)
    own(model, _projections(recipe))
    model.config.attention_free = recipe.skipped
    take_attention_out(model, recipe.skipped)
    model.__class__ = _limit_class(type(model))
    return model


# In the order of the tables. The first is what all others are compared with.
BUILDERS: dict[str, Callable[[Recipe], nn.Module]] = {
    "base": lambda recipe: recipe.base,
    "lora-merged": lora_merged,
    "adapters": lambda recipe: adapted(recipe, []),
    "eas-unmerged": lambda recipe: adapted(recipe, recipe.skipped),
    "eas-merged": merged,
    "eas-merged-prompt": lambda recipe: merged(recipe, context="prompt"),
    "limit": limit,
}
LABELS = {
    "base": "base",
    "lora-merged": "LoRA, merged",
    "adapters": "adapters, nothing skipped, unmerged",
    "eas-unmerged": "EAS, unmerged",
    "eas-merged": "EAS, merged",
    "eas-merged-prompt": "EAS, merged, prompt context",
    "limit": "limit: written without the attentions",
}


def new_cache(model: nn.Module, max_length: int | None = None) -> Cache:
    """An empty KV cache for `model`, of a fixed size with `max_length`; the limit's has no slots for what it lacks."""
    config = model.config.get_text_config(decoder=True)
    kept = getattr(model.config, "kept_attentions", None)
    if kept is not None:
        config = copy.deepcopy(config)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in kept]
        config.num_hidden_layers = len(kept)
    return DynamicCache(config=config) if max_length is None else StaticCache(config=config, max_cache_len=max_length)
