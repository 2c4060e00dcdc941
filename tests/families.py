"""One row per model family: how a tiny model of it is made, and what it is given.

Beside the families of conftest.py, which most tests run over, these are run over by test_architectures.py. To add a
family, add a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from conftest import FAMILIES as CORE
from conftest import IMAGE_TOKEN, VOCAB, WIDTH
from peft import PeftModel, get_peft_model
from torch import nn

from peft_eas import EASConfig
from peft_eas.architectures import find_mhas

# Ids that stand for images and the like in some of the models.
SPECIAL_TOKENS = [57, 58, 59, IMAGE_TOKEN]
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_DECODER = {**_SIZES, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 128}
_ENCODER = {
    **_SIZES,
    **_TOKENS,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FALCON = {**_SIZES, **_TOKENS, "attention_dropout": 0.0, "hidden_dropout": 0.0, "ffn_hidden_size": 48}
_BERTS = {**_ENCODER, "num_hidden_layers": 2}
_OPT = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "dropout": 0.0,
}
_DEEPSEEK = {
    **_SIZES,
    **_TOKENS,
    **_EXPERTS,
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "max_position_embeddings": 128},
}
_T5 = {
    **{"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
    **{"dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0},
}
_BART = {
    **{"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 2},
    **{"bos_token_id": 1, "forced_eos_token_id": None},
}


def _text(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, IMAGE_TOKEN - 3, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(*shape: int) -> Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]:
    return lambda batch, length, generator: {"pixel_values": torch.randn(batch, *shape, generator=generator)}


def _text_and(
    num_image_tokens: int, *shape: int, **others: Any
) -> Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]:
    """Text whose first tokens behind the very first stand for an image of `shape`; `others` are given per sample."""

    def make(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        inputs = _text(batch, max(length, num_image_tokens + 8), generator)
        inputs["input_ids"][:, 1 : 1 + num_image_tokens] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(batch, *shape, generator=generator)
        return inputs | {name: torch.tensor([value] * batch) for name, value in others.items()}

    return make


def _packed_images(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = _text(batch, length, generator)
    inputs["input_ids"][:, 1], inputs["input_ids"][:, 2], inputs["input_ids"][:, 3] = 57, IMAGE_TOKEN, 58
    inputs["pixel_values"] = torch.randn(batch * 4, 3 * 2 * 4 * 4, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * batch)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return inputs


def _text_to_text(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    targets = torch.randint(3, IMAGE_TOKEN, (batch, 7), generator=generator)
    return {**_text(batch, length, generator), "decoder_input_ids": targets}


def _speech_to_text(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    features = torch.randn(batch, 8, 20, generator=generator)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, 60, (batch, 7), generator=generator)}


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model: what makes its config, the class that is built from it, and what makes its inputs.

    Attributes:
        num_candidates: MHAs that are targets by default.
        on_request: a regular expression over MHAs that are targets on request, or None.
        kind: "decoder" (generates, and its labels are its tokens), "encoder-decoder" (generates), or "encoder".
    """

    config: Callable[[], transformers.PreTrainedConfig]
    model_class: str
    inputs: Callable[[int, int, torch.Generator], dict[str, torch.Tensor]] = _text
    num_candidates: int = 4
    kind: str = "decoder"
    on_request: str | None = None
    task_type: str | None = None

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """The model with weights so wide that a wrong token, mask or position shows, in evaluation mode."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(0.2 * noise) if parameter.dim() == 1 else parameter.copy_(0.2 * noise)
        return model.eval()

    def make_inputs(self, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs without labels or padding."""
        return self.inputs(batch, length, torch.Generator().manual_seed(seed))


def _core(name: str, **options: Any) -> Family:
    config, model_class = CORE[name]
    return Family(config, model_class, **options)


def _clip() -> transformers.PreTrainedConfig:
    text = {**_SIZES, **_TOKENS, "max_position_embeddings": 64, "eos_token_id": 2}
    return transformers.CLIPConfig(text_config=text, vision_config=_IMAGE, projection_dim=16)


def _siglip() -> transformers.PreTrainedConfig:
    text = {**_SIZES, **_TOKENS, "max_position_embeddings": 64, "projection_size": WIDTH}
    return transformers.SiglipConfig(text_config=text, vision_config=_IMAGE)


def _clip_image_and_text(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_text(batch, length, generator), **_pixels(3, 16, 16)(batch, length, generator)}


def _llava() -> transformers.PreTrainedConfig:
    config = CORE["llava"][0]()
    config.vision_feature_layer = -1  # of which all layers learn
    return config


def _llava_next() -> transformers.PreTrainedConfig:
    return transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**_DECODER),
        vision_config=transformers.CLIPVisionConfig(**_IMAGE),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1,
    )


def _qwen2_vl(config_class: type, **vision: Any) -> transformers.PreTrainedConfig:
    text = {**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return config_class(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, **vision},
        image_token_id=IMAGE_TOKEN,
        video_token_id=59,
        vision_start_token_id=57,
        vision_end_token_id=58,
    )


def _idefics(config_class: type) -> transformers.PreTrainedConfig:
    return config_class(
        text_config=transformers.LlamaConfig(**_DECODER),
        vision_config={**_SIZES, "image_size": 16, "patch_size": 4},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )


def _paligemma() -> transformers.PreTrainedConfig:
    return transformers.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma", "head_dim": 8},
        vision_config={**_IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE_TOKEN,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


def _internvl() -> transformers.PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config={**_DECODER, "model_type": "qwen2"},
        vision_config={**_IMAGE, "image_size": [16, 16], "patch_size": [4, 4], "layer_scale_init_value": 1.0},
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
    )


def _vilt() -> transformers.PreTrainedConfig:
    return transformers.ViltConfig(**{**_ENCODER, "image_size": 16, "patch_size": 8, "max_image_length": -1})


def _bridgetower() -> transformers.PreTrainedConfig:
    return transformers.BridgeTowerConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        text_config={
            **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
            **{"vocab_size": VOCAB, "max_position_embeddings": 66, "pad_token_id": 0},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        },
        vision_config={"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 16},
    )


def _whisper() -> transformers.PreTrainedConfig:
    return transformers.WhisperConfig(
        **{**_BART, "eos_token_id": 59, "suppress_tokens": None, "begin_suppress_tokens": None},
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=64,
    )


ARCHITECTURES: dict[str, Family] = {
    # decoders
    **{name: _core(name) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")},
    "smollm3": Family(lambda: transformers.SmolLM3Config(**_DECODER), "SmolLM3ForCausalLM"),
    "gemma": Family(lambda: transformers.GemmaConfig(**_DECODER, head_dim=8), "GemmaForCausalLM"),
    "olmo2": Family(lambda: transformers.Olmo2Config(**_DECODER), "Olmo2ForCausalLM"),
    "phi3": Family(lambda: transformers.Phi3Config(**_DECODER), "Phi3ForCausalLM"),
    "starcoder2": Family(
        lambda: transformers.Starcoder2Config(**_DECODER, residual_dropout=0.0, embedding_dropout=0.0),
        "Starcoder2ForCausalLM",
    ),
    "mixtral": Family(
        lambda: transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
        "MixtralForCausalLM",
    ),
    "qwen3_moe": Family(
        lambda: transformers.Qwen3MoeConfig(**_DECODER, **_EXPERTS, num_experts=4, decoder_sparse_step=2, head_dim=8),
        "Qwen3MoeForCausalLM",
    ),
    "llama4": Family(
        lambda: transformers.Llama4TextConfig(
            **_DECODER, num_local_experts=4, interleave_moe_layer_step=2, intermediate_size_mlp=40, head_dim=8
        ),
        "Llama4ForCausalLM",
    ),
    "deepseek_v3": Family(lambda: transformers.DeepseekV3Config(**_DEEPSEEK, q_lora_rank=16), "DeepseekV3ForCausalLM"),
    "deepseek_v3 without a latent of the queries": Family(
        lambda: transformers.DeepseekV3Config(**_DEEPSEEK, q_lora_rank=None), "DeepseekV3ForCausalLM"
    ),
    "gpt_neox": Family(
        lambda: transformers.GPTNeoXConfig(**_SIZES, **_TOKENS, hidden_dropout=0.0, max_position_embeddings=128),
        "GPTNeoXForCausalLM",
    ),
    "gpt_neox, MHA and FFN in turns": Family(
        lambda: transformers.GPTNeoXConfig(
            **_SIZES, **_TOKENS, use_parallel_residual=False, max_position_embeddings=128
        ),
        "GPTNeoXForCausalLM",
    ),
    "falcon": Family(
        lambda: transformers.FalconConfig(**_FALCON, parallel_attn=True, new_decoder_architecture=False),
        "FalconForCausalLM",
    ),
    "falcon, a norm for each": Family(
        lambda: transformers.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
        "FalconForCausalLM",
    ),
    "falcon, MHA and FFN in turns": Family(
        lambda: transformers.FalconConfig(
            **_FALCON, parallel_attn=False, new_decoder_architecture=False, alibi=True, multi_query=False
        ),
        "FalconForCausalLM",
    ),
    "opt": Family(lambda: transformers.OPTConfig(**_OPT, max_position_embeddings=128), "OPTForCausalLM"),
    "opt, norms behind": Family(
        lambda: transformers.OPTConfig(**_OPT, max_position_embeddings=128, do_layer_norm_before=False),
        "OPTForCausalLM",
    ),
    # encoders
    "bert": _core("bert", kind="encoder", task_type="SEQ_CLS"),
    "roberta": Family(
        lambda: transformers.RobertaConfig(**_ENCODER),
        "RobertaForSequenceClassification",
        kind="encoder",
        task_type="SEQ_CLS",
    ),
    "xlm-roberta": Family(
        lambda: transformers.XLMRobertaConfig(**_ENCODER),
        "XLMRobertaForTokenClassification",
        kind="encoder",
        task_type="TOKEN_CLS",
    ),
    "modernbert": Family(
        lambda: transformers.ModernBertConfig(
            **{**_SIZES, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 64},
            **{"local_attention": 6, "global_attn_every_n_layers": 2, "num_labels": 3},
        ),
        "ModernBertForSequenceClassification",
        kind="encoder",
        task_type="SEQ_CLS",
    ),
    "vit": _core("vit", inputs=_pixels(3, 16, 16), kind="encoder"),
    "dinov2": Family(
        lambda: transformers.Dinov2Config(**_IMAGE, num_labels=3),
        "Dinov2ForImageClassification",
        _pixels(3, 16, 16),
        kind="encoder",
    ),
    "clip": Family(_clip, "CLIPModel", _clip_image_and_text, kind="encoder", on_request=r"vision_model.*self_attn"),
    "clip_vision_model": Family(
        lambda: transformers.CLIPVisionConfig(**_IMAGE), "CLIPVisionModel", _pixels(3, 16, 16), kind="encoder"
    ),
    "siglip": Family(
        _siglip, "SiglipModel", _clip_image_and_text, kind="encoder", on_request=r"vision_model.*self_attn"
    ),
    # encoder-decoders
    "t5": Family(
        lambda: transformers.T5Config(**_T5, feed_forward_proj="relu"),
        "T5ForConditionalGeneration",
        _text_to_text,
        num_candidates=7,
        kind="encoder-decoder",
    ),
    "t5 1.1": Family(
        lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "T5ForConditionalGeneration",
        _text_to_text,
        num_candidates=7,
        kind="encoder-decoder",
    ),
    "bart": Family(
        lambda: transformers.BartConfig(**_BART, max_position_embeddings=64),
        "BartForConditionalGeneration",
        _text_to_text,
        num_candidates=6,
        kind="encoder-decoder",
    ),
    "whisper": Family(
        _whisper, "WhisperForConditionalGeneration", _speech_to_text, num_candidates=6, kind="encoder-decoder"
    ),
    "encoder-decoder of two berts": Family(
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.BertConfig(**_BERTS),
            transformers.BertConfig(**_BERTS),
            decoder_start_token_id=2,
            pad_token_id=0,
        ),
        "EncoderDecoderModel",
        _text_to_text,
        num_candidates=6,
        kind="encoder-decoder",
    ),
    # several modalities
    "llava": Family(
        _llava, "LlavaForConditionalGeneration", _text_and(4, 3, 16, 16), on_request=r".*vision_tower.*self_attn"
    ),
    "llava_next": Family(
        _llava_next,
        "LlavaNextForConditionalGeneration",
        _text_and(10, 2, 3, 16, 16, image_sizes=[16, 16]),
        on_request=r".*vision_tower.*self_attn",
    ),
    "qwen2_vl": Family(
        lambda: _qwen2_vl(transformers.Qwen2VLConfig, embed_dim=WIDTH, hidden_size=WIDTH),
        "Qwen2VLForConditionalGeneration",
        _packed_images,
        on_request=r".*visual.*attn",
    ),
    "qwen2_5_vl": Family(
        lambda: _qwen2_vl(
            transformers.Qwen2_5_VLConfig, hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH
        ),
        "Qwen2_5_VLForConditionalGeneration",
        _packed_images,
        on_request=r".*visual.*attn",
    ),
    "smolvlm": Family(
        lambda: _idefics(transformers.SmolVLMConfig),
        "SmolVLMForConditionalGeneration",
        _text_and(4, 1, 3, 16, 16),
        on_request=r".*vision_model.*self_attn",
    ),
    "idefics3": Family(
        lambda: _idefics(transformers.Idefics3Config),
        "Idefics3ForConditionalGeneration",
        _text_and(4, 1, 3, 16, 16),
        on_request=r".*vision_model.*self_attn",
    ),
    "paligemma": Family(
        _paligemma,
        "PaliGemmaForConditionalGeneration",
        _text_and(4, 3, 16, 16),
        on_request=r".*vision_tower.*self_attn",
    ),
    "internvl": Family(
        _internvl,
        "InternVLForConditionalGeneration",
        _text_and(4, 3, 16, 16),
        on_request=r".*vision_tower.*attention",
    ),
    "vilt": Family(_vilt, "ViltForQuestionAnswering", _clip_image_and_text, kind="encoder"),
    "bridgetower": Family(_bridgetower, "BridgeTowerModel", _clip_image_and_text, num_candidates=11, kind="encoder"),
}


# --- models with adapters --------------------------------------------------------------------------------------------

# Of a model's outputs, the first that it has.
KEYS = ("logits", "logits_per_image", "pooler_output", "last_hidden_state")
# By what is skipped: of the candidates, in the model's order.
SKIPS = {
    "first": lambda names: names[:1],
    "last": lambda names: names[-1:],
    "some": lambda names: names[::2],
    "others": lambda names: names[1::2],
    "all": lambda names: names,
}


@cache
def candidates(family: Family, on_request: bool) -> list[str]:
    """Full names of the targets: by default, or on request."""
    config = EASConfig(num_skip=0, target_modules=family.on_request if on_request else None)
    return get_peft_model(family.build(), config).base_model.candidates


@cache
def output_r(family: Family, on_request: bool = False) -> int:
    """A rank of output adapters, or 0 where the family has a mixture of experts among its targets."""
    names = candidates(family, on_request)
    return 4 * all(row.output_projection for mha, _, row in find_mhas(family.build()) if mha in names)


@cache
def ffn_r(family: Family, on_request: bool = False) -> int:
    """A rank of adapters in front of kept MHAs' FFNs, or 0 where all of these are mixtures of experts."""
    names = candidates(family, on_request)
    return 4 * any(not row.experts for mha, _, row in find_mhas(family.build()) if mha in names)


def make(family: Family, skip: str | None, context: str = "running", on_request: bool = False, **options) -> PeftModel:
    """The family's model with adapters that are not the identity, and running contexts that have seen two batches."""
    names = candidates(family, on_request)
    defaults = {"r": 8, "attention_r": 4, "dropout": 0.0, "init_weights": False, "task_type": family.task_type}
    defaults |= {"output_r": output_r(family, on_request), "ffn_r": ffn_r(family, on_request)}
    torch.manual_seed(1)
    config = EASConfig(
        **{**defaults, **options},
        skipped_modules=SKIPS[skip](names) if skip else [],
        target_modules=names,
    )
    model = get_peft_model(family.build(), config)
    for seed in (100, 101):
        with torch.no_grad():
            model.train()(**labelled(family, family.make_inputs(seed=seed)))
    if context == "running":
        model.base_model.freeze_context()
    return model.eval()


def labelled(family: Family, inputs: dict) -> dict:
    """The inputs with labels whose first four tokens are no answer, where labels are tokens."""
    if family.kind == "encoder":
        return inputs
    labels = inputs.get("decoder_input_ids", inputs.get("input_ids")).clone()
    labels[:, :4] = -100
    if family.model_class.startswith("PaliGemma"):  # its prompt is not causal; these tell what is
        inputs = {**inputs, "token_type_ids": (labels != -100).long()}
    return {**inputs, "labels": labels}


@torch.no_grad()
def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    """All that the model says to `inputs`, in one row per sample."""
    torch.manual_seed(0)  # ViLT draws the order of an image's patches
    result = model(**inputs)
    return next(result[key] for key in KEYS if result.get(key) is not None)
