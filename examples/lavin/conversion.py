"""Converts the original files of Llama, CLIP and the released LaVIN and LaVIN-EAS adapters.

Names and shapes are those of facebookresearch/llama (`consolidated.NN.pth`, `params.json`), openai/CLIP
(`visual.transformer.resblocks...`), luogen1996/LaVIN (`adapter_attn`, `adapter_proj`,
`adapter_modality_embedding`) and DoubtedSteam/EAS (and `replaced_adapter`). Files are read as tensors alone: no code
of theirs is run.

What a released adapter computes is kept as far as any function of one sample can keep it:

* LaVIN's text adapters, exactly; `LavinProcessor(routing="modality")` routes them by the modality token, as they were.
* LaVIN's vision adapters index (tokens, batch, width) as if the batch came first: each place of an image is routed by
  the same place of the batch's first image, which no checkpoint can repeat. Here it is the mean over the image.
* LaVIN-EAS feeds a skipped block's FFN w2 * PIA(N1(x)), with w2 the weight of the FFN's norm N2 = w2 * x / rms(x) and
  N1 likewise. That is PIA'(N2'(x)) where N2' has the weight w1 * w2 and PIA' reads and writes through w2: so the
  skipped blocks' norms in the converted base are others than Llama's, and the adapter belongs to that base.
* LaVIN-EAS takes the context over answer and padding too in training, over the prompt in evaluation, and its routers
  leave the modality token (in images, the class token) out. Here both are the mean over the prompt (the image).
"""

import json
import math
import re
import warnings
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.lavin.modeling_lavin import EAS_ARGUMENTS, LavinForConditionalGeneration
from examples.lavin.processing_lavin import LavinProcessor
from examples.shared.released_files import clip_vision_weight, load_tensors
from peft_eas import EASConfig

Weights = dict[str, Tensor]
# Which MHAs the converted adapters stand in front of.
TEXT_MHA = "model.language_model.layers.{}.self_attn"
TEXT_INPUT = f"{TEXT_MHA}.eas_input"
TEXT_PIA = "model.language_model.layers.{}.mlp.eas_pia"
VISION_INPUT = "model.vision_tower.encoder.layers.{}.self_attn.eas_input"
PROJECTOR, MODALITY = EAS_ARGUMENTS["modules_to_save"]


def check_names(what: str, given: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError if weights are missing or unexpected."""
    given, expected = set(given), set(expected)
    for kind, names in (("lacks", sorted(expected - given)), ("has unexpected", sorted(given - expected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{what} {kind} {', '.join(names[:3])}{more}. It must hold {len(expected)} weights by the released "
                "names, such as "
                f"{min(expected)}. Give the original file of a model of that kind, whole and unchanged."
            )


def check_shape(what: str, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a weight has another shape than `shapes` says."""
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{what} has {name} of shape {tuple(weights[name].shape)}, but the other weights ask for {shape}. "
                "Give files that belong together."
            )


# --- Llama -----------------------------------------------------------------------------------------------------------

_LLAMA_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LLAMA_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# Along which dimension the shards of a weight were cut: the outputs, or the inputs.
_CUT = {
    **dict.fromkeys(
        ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output"), 0
    ),
    **dict.fromkeys(("attention.wo", "feed_forward.w2", "tok_embeddings"), 1),
}


def load_llama(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama from a folder with `params.json` and `consolidated.*.pth`, one shard or several.

    Raises:
        FileNotFoundError, ValueError: if files or weights are missing, unexpected or misshaped.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not (folder / "params.json").is_file() or not paths:
        raise FileNotFoundError(
            f"{folder} does not hold params.json and consolidated.00.pth. Name the folder of one original Llama, such "
            "as the one called 7B."
        )
    params = _read_params(folder / "params.json")
    layers, heads, width = params["n_layers"], params["n_heads"], params["dim"]
    names = [f"{name}.weight" for name in _LLAMA_ENDS]
    names += [f"layers.{i}.{name}.weight" for i in range(layers) for name in _LLAMA_NAMES]
    shards = []
    for path in paths:
        shard = {name: value for name, value in load_tensors(path).items() if not name.endswith("rope.freqs")}
        check_names(str(path), shard, names)
        shards.append(shard)
    weights: Weights = {}
    for name in names:
        parts = [shard.pop(name) for shard in shards]
        cut = _CUT.get(re.sub(r"^layers\.\d+\.|\.weight$", "", name))
        weights[name] = parts[0] if cut is None or len(parts) == 1 else torch.cat(parts, cut)
    kv_heads = params.get("n_kv_heads") or heads
    kv_width, ffn_width = width // heads * kv_heads, weights["layers.0.feed_forward.w1.weight"].shape[0]
    vocab_size = weights["tok_embeddings.weight"].shape[0]
    shapes = {"tok_embeddings": (vocab_size, width), "norm": (width,), "output": (vocab_size, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.attention.{name}": (width, width) for name in ("wq", "wo")}
        shapes |= {f"layers.{i}.attention.{name}": (kv_width, width) for name in ("wk", "wv")}
        shapes |= {f"layers.{i}.feed_forward.{name}": (ffn_width, width) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2": (width, ffn_width)}
        shapes |= {f"layers.{i}.{name}": (width,) for name in ("attention_norm", "ffn_norm")}
    check_shape(str(folder), weights, {f"{name}.weight": shape for name, shape in shapes.items()})
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=params["norm_eps"],
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    ours = {f"{new}.weight": weights[f"{old}.weight"] for old, new in _LLAMA_ENDS.items()}
    for i in range(layers):
        for old, new in _LLAMA_NAMES.items():
            weight = weights[f"layers.{i}.{old}.weight"]
            if old in ("attention.wq", "attention.wk"):
                weight = halves_from_pairs(weight, heads if old == "attention.wq" else kv_heads)
            ours[f"model.layers.{i}.{new}.weight"] = weight
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=ours, dtype=dtype)


def _read_params(path: Path) -> dict[str, Any]:
    needed = ("n_layers", "n_heads", "dim", "norm_eps")
    try:
        params = json.loads(path.read_text())
        missing = [name for name in needed if name not in params]
    except (json.JSONDecodeError, TypeError):
        missing = needed
    if missing:
        raise ValueError(
            f"{path} does not tell {', '.join(missing)}. It must be a dictionary in JSON, as it lies beside the "
            "original weights; download it again."
        )
    if params.get("use_scaled_rope"):
        raise ValueError(
            f"{path} asks for scaled rotary embeddings (Llama 3.1 and later), which are not converted. Take the same "
            "model in transformers' format, and LavinForConditionalGeneration.from_parts."
        )
    return params


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorders a query or key projection, (heads x head width, width), for transformers' rotary embedding.

    It turns dimension i of a head together with i + half, the original one 2 i with 2 i + 1.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


# --- CLIP ------------------------------------------------------------------------------------------------------------

_CLIP_ENDS = (
    "conv1.weight",
    "class_embedding",
    "positional_embedding",
    *(f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
)
_CLIP_PARTS = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")


def load_clip(path: Path, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    """The vision tower of an original CLIP with a vision transformer; the text model in the file is left out.

    Raises:
        FileNotFoundError, ValueError: if weights are missing, unexpected or misshaped.
    """
    held = load_tensors(Path(path))
    weights = {
        name.removeprefix("visual."): value.detach()
        for name, value in held.items()
        if name.startswith("visual.") and name != "visual.proj"  # behind the last norm, which LaVIN does not use
    }
    layers = 1 + max(
        (int(m[1]) for name in weights if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))), default=-1
    )
    names = set(_CLIP_ENDS)
    for i in range(max(1, layers)):
        block = f"transformer.resblocks.{i}"
        names |= {f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"}
        names |= {f"{block}.{name}.{kind}" for name in _CLIP_PARTS for kind in ("weight", "bias")}
    check_names(str(path), (f"visual.{name}" for name in weights), (f"visual.{name}" for name in names))
    width, _, patch_size, _ = weights["conv1.weight"].shape
    grid = math.isqrt(len(weights["positional_embedding"]) - 1)
    ffn_width = len(weights["transformer.resblocks.0.mlp.c_fc.bias"])
    shapes: dict[str, tuple[int, ...]] = {"positional_embedding": (grid * grid + 1, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width)}
        shapes |= {f"{block}.mlp.c_fc.weight": (ffn_width, width), f"{block}.mlp.c_proj.weight": (width, ffn_width)}
    check_shape(str(path), weights, shapes)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=grid * patch_size,
        patch_size=patch_size,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    ours = dict(item for name, weight in weights.items() for item in clip_vision_weight(name, weight))
    return CLIPVisionModel.from_pretrained(None, config=config, state_dict=ours, dtype=dtype)


# --- the released adapters -------------------------------------------------------------------------------------------

_ROUTED = {"conv_A": "token_down", "conv_B": "up.0", "conv_D": "up.1", "expert_weights": "router"}
_PIA = {
    "conv_A": "context_down",
    "conv_C": "token_down",
    "conv_B": "up.0",
    "conv_D": "up.1",
    "expert_weights": "router",
}
_KINDS = ("weight", "bias")


@dataclass(frozen=True)
class ReleasedAdapter:
    """A released checkpoint, read and checked.

    Attributes:
        text, vision: by layer, the adapters of the MHAs. pia: by layer, those of skipped MHAs; empty for LaVIN.
        projector, modality: the trained parts. skipped: the layers that are skipped.
        scale, temperature: of the adapters.
    """

    text: dict[int, Weights]
    vision: dict[int, Weights]
    pia: dict[int, Weights]
    projector: Weights
    modality: Tensor
    skipped: tuple[int, ...]
    scale: float
    temperature: float


def read_adapter(
    path: Path,
    layers: int,
    vision_layers: int,
    skipped: Iterable[int] | None = None,
    scale: float | None = None,
    temperature: float | None = None,
) -> ReleasedAdapter:
    """Reads a released checkpoint of LaVIN or LaVIN-EAS for a model with so many layers.

    Args:
        skipped, scale, temperature: None for what the checkpoint's own `args` say, or else nothing, 1 and 10.

    Raises:
        FileNotFoundError, ValueError: if weights are missing, unexpected or misshaped, or if a layer does not exist.
    """
    held = load_tensors(Path(path))
    arguments = vars(held["args"]) if isinstance(held.get("args"), Namespace) else {}
    held = held.get("model", held)
    weights = {name.replace("module.", ""): value for name, value in held.items()}
    weights.pop("scores", None)  # the search's
    text = [f"layers.{i}.adapter_attn" for i in range(layers)]
    pia = [f"layers.{i}.replaced_adapter" for i in range(layers)]
    vision = [f"backbone.visual.transformer.resblocks.{i}.adapter_attn" for i in range(vision_layers)]
    has_pia = any(".replaced_adapter." in name for name in weights)
    names = [f"{p}.{part}.{kind}" for p in text + vision for part in _ROUTED for kind in _KINDS]
    names += [f"{p}.{part}.{kind}" for p in (pia if has_pia else []) for part in _PIA for kind in _KINDS]
    projector = {
        f"adapter_proj.{old}.{kind}": f"{new}.{kind}"
        for old, new in (("conv_A", "linear_1"), ("conv_B", "linear_2"))
        for kind in _KINDS
    }
    modality = "adapter_modality_embedding.weight"
    if has_pia and arguments.get("visual_adapter_type", "router_block") != "router_block":
        # LaVIN-EAS then makes adapters in front of the vision tower's FFNs, and never calls them.
        weights = {
            name: value for name, value in weights.items() if ".visual." not in name or ".adapter_mlp." not in name
        }
    # Adapters in front of FFNs, and vision adapters without a router, which have no residual, are no EAS adapters.
    check_names(str(path), weights, [*names, *projector, modality])
    if skipped is None:
        skipped = [int(index) for index in re.findall(r"-?\d+", str(arguments.get("skip_list", "")))]
    skipped = tuple(sorted(set(skipped)))
    strange = [index for index in skipped if not 0 <= index < layers]
    if strange or (skipped and not has_pia):
        allowed = f"are layers 0 to {layers - 1}" if has_pia else "is none: it holds no replaced_adapter"
        raise ValueError(f"{path} is to skip the layers {list(skipped)}, but allowed {allowed}. Name others.")
    if has_pia and not skipped:
        raise ValueError(
            f"{path} holds adapters for skipped attentions, but not which layers are skipped. Say so: skipped=[...], "
            "or --skip on the command line, as the released scripts' --skip_list."
        )

    def part_of(prefix: str, parts: dict[str, str]) -> Weights:
        found = {f"{new}.{kind}": weights[f"{prefix}.{old}.{kind}"] for old, new in parts.items() for kind in _KINDS}
        return {name: value[..., 0] if value.dim() == 3 else value for name, value in found.items()}

    def given(name: str, value: float | None, default: float) -> float:
        return float(arguments.get(name, default) if value is None else value)

    return ReleasedAdapter(
        text={i: part_of(text[i], _ROUTED) for i in range(layers)},
        vision={i: part_of(vision[i], _ROUTED) for i in range(vision_layers)},
        pia={i: part_of(pia[i], _PIA) for i in range(layers)} if has_pia else {},
        projector={new: weights[old] for old, new in projector.items()},
        modality=weights[modality],
        skipped=skipped,
        scale=given("adapter_scale", scale, 1.0),
        temperature=given("temperature", temperature, 10.0),
    )


def convert_adapter(lavin: LavinForConditionalGeneration, released: ReleasedAdapter) -> PeftModel:
    """Puts a released adapter on `lavin`, as an EAS adapter; where layers are skipped, `lavin`'s norms change.

    Raises:
        ValueError: if the adapter does not fit, before anything has changed.
    """
    text, vision = released.text[0], released.vision[0]
    rank, vision_rank = (len(weights["token_down.bias"]) for weights in (text, vision))
    if rank != vision_rank:
        raise ValueError(
            f"The text adapters have rank {rank} and the vision adapters {vision_rank}. One rank is allowed, as the "
            "released scripts' --adapter_dim gives both; other adapters cannot be converted."
        )
    width, vision_width = lavin.config.text_config.hidden_size, lavin.config.vision_config.hidden_size
    groups = rank // max(1, text["up.0.weight"].shape[1])
    if groups < 1:
        raise ValueError(
            f"The adapters' up-projections read {text['up.0.weight'].shape[1]} units of a bottleneck of {rank}. "
            "Allowed is at most the rank; take the adapter from a whole, unchanged file."
        )
    pia_rank = len(released.pia[0]["token_down.bias"]) if released.pia else 4 * rank
    for i, adapter in released.text.items():
        check_shape(f"The adapter of text layer {i}", adapter, _shapes(width, rank, groups))
    for i, adapter in released.vision.items():
        check_shape(f"The adapter of vision layer {i}", adapter, _shapes(vision_width, rank, groups))
    for i, adapter in released.pia.items():
        check_shape(f"The adapter for the attention of layer {i}", adapter, _shapes(width, pia_rank, groups, pia=True))
    trained = {
        f"{name}.{part}": value
        for name in (PROJECTOR, MODALITY)
        for part, value in getattr(lavin.model, name).state_dict().items()
    }
    weights = {f"{PROJECTOR}.{name}": value for name, value in released.projector.items()}
    weights[f"{MODALITY}.weight"] = released.modality
    check_shape("The adapter", weights, {name: tuple(value.shape) for name, value in trained.items()})
    weights = {f"model.{name}": value for name, value in weights.items()}

    blocks = lavin.model.language_model.layers
    pia = {i: _through_norm(released.pia[i], blocks[i].post_attention_layernorm.weight, i) for i in released.skipped}
    for i in released.skipped:  # all is checked: from here on it changes
        norm = blocks[i].post_attention_layernorm.weight
        norm.data = (norm.float() * blocks[i].input_layernorm.weight.float()).to(norm.dtype)
    config = EASConfig(
        task_type="CAUSAL_LM",
        **EAS_ARGUMENTS,
        skipped_modules=[TEXT_MHA.format(i) for i in released.skipped],
        r=pia_rank,
        attention_r=rank,
        groups=groups,
        scale=released.scale,
        router_temperature=released.temperature,
    )
    model = get_peft_model(lavin, config)
    kept = {i: adapter for i, adapter in released.text.items() if i not in released.skipped}
    for name, adapters in ((TEXT_INPUT, kept), (VISION_INPUT, released.vision), (TEXT_PIA, pia)):
        for i, adapter in adapters.items():
            weights |= {f"{name.format(i)}.{part}": value for part, value in adapter.items()}
    weights = {f"base_model.model.{name}": value for name, value in weights.items()}
    set_peft_model_state_dict(model, get_peft_model_state_dict(model) | weights)  # with its statistics as they are
    _warn(released)
    return model.eval()


def _shapes(width: int, rank: int, groups: int, pia: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (2, width), "router.bias": (2,)}
    for down in ("token_down", "context_down")[: 2 if pia else 1]:
        shapes |= {f"{down}.weight": (rank, width), f"{down}.bias": (rank,)}
    for path in ("up.0", "up.1"):
        shapes |= {f"{path}.weight": (width, rank // groups), f"{path}.bias": (width,)}
    return shapes


def _through_norm(adapter: Weights, norm: Tensor, layer: int) -> Weights:
    """PIA' with PIA'(w z) = w PIA(z), for the weight w of the FFN's norm; see above."""
    norm = norm.detach().float()
    if not (norm != 0).all():
        raise ValueError(
            f"The FFN's norm of layer {layer} has a weight of 0, through which the adapter cannot be written. Skip "
            "other layers, or train the adapter anew."
        )
    read = {"token_down.weight", "context_down.weight", "router.weight"}
    written = {"up.0.weight": norm[:, None], "up.1.weight": norm[:, None], "up.0.bias": norm, "up.1.bias": norm}
    return {
        name: value / norm if name in read else value * written[name] if name in written else value
        for name, value in ((name, value.float()) for name, value in adapter.items())
    }


def _warn(released: ReleasedAdapter) -> None:
    if released.pia:
        what = (
            "Its contexts and routers differ a little from the released LaVIN-EAS: they see the mean over the whole "
            "prompt, and over the whole image, where the released ones leave the modality token or the class token "
            "out of some means. The base's norms in skipped blocks were changed for it: keep the two together."
        )
    else:
        what = (
            "Its vision adapters are routed by the mean over the image, the released ones by the batch's first image, "
            "which cannot be repeated; the text adapters are exact with LavinProcessor(routing='modality')."
        )
    warnings.warn(f"The adapter was converted. {what}", stacklevel=3)


# --- all together ----------------------------------------------------------------------------------------------------


def convert(
    llama: Path,
    clip: Path,
    adapter: Path | None,
    output: Path,
    tokenizer: Path | None = None,
    skipped: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes `output`/base, a LaVIN with its processor, and `output`/adapter if there is one.

    Args:
        llama: the folder of an original Llama. clip: the weights of an original CLIP. adapter: a released checkpoint.
        tokenizer: a folder with Llama's tokenizer as transformers reads it; None for `llama` itself or the one above.
        skipped: see `read_adapter`. dtype: of the base's weights.

    Raises:
        FileNotFoundError, ValueError: if anything does not fit; nothing is written then.
    """
    tokens = load_tokenizer(tokenizer or llama)
    text, vision = load_llama(llama, dtype), load_clip(clip, dtype)
    released = None
    if adapter is not None:
        released = read_adapter(
            adapter, text.config.num_hidden_layers, vision.config.num_hidden_layers, skipped=skipped
        )
    narrow = {} if released is None else {"projector_width": len(released.projector["linear_1.bias"])}
    model = LavinForConditionalGeneration.from_parts(text, vision, tokens, **narrow)
    tuned = convert_adapter(model, released) if released is not None else None
    size = {"height": vision.config.image_size, "width": vision.config.image_size}
    processor = LavinProcessor(
        tokens,
        # As the released code prepares images: neither cropped nor with CLIP's own mean.
        CLIPImageProcessorPil(
            size=size,
            crop_size=size,
            do_center_crop=False,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ),
        model.config.num_image_tokens,
        routing="modality" if released is not None and not released.pia else "prompt",
        separator="",
    )
    if tuned is not None:
        tuned.save_pretrained(output / "adapter")
        model = tuned.unload()
    model.save_pretrained(output / "base")
    processor.save_pretrained(output / "base")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Llama's tokenizer, from its folder or, as in the original files, the one above.

    Raises:
        FileNotFoundError, ValueError: if there is none, or if it cannot be read.
    """
    for place in (Path(folder), Path(folder).parent):
        if (place / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(place)
        if (place / "tokenizer.model").is_file():  # which tells AutoTokenizer nothing of its rules
            try:
                return LlamaTokenizer.from_pretrained(place)
            except (ImportError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{place / 'tokenizer.model'} cannot be read ({str(error).splitlines()[0]}). Run `pip install "
                    "sentencepiece protobuf`, or name the folder of a tokenizer.json (--tokenizer)."
                ) from error
    raise FileNotFoundError(
        f"Neither {folder} nor the folder above holds tokenizer.json or tokenizer.model. Name the tokenizer's folder."
    )
