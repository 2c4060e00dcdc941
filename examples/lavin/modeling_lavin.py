"""LaVIN: a frozen Llama that looks at images through a frozen CLIP vision tower and small adapters.

Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models",
arXiv 2305.15023. This is the model without its adapters, which `peft_eas` brings: LaVIN is what
`get_peft_model(lavin, EASConfig(...))` gives while nothing is skipped.

* An image becomes as many tokens as the vision tower has layers, divided by `vision_layer_interval`: the class token's
  states behind every fourth layer, without the tower's last norm, through a narrow MLP.
* A sequence starts with the modality token, one of two learned embeddings: with an image, or text only. No other token
  attends to it, and it attends to itself alone. `LavinProcessor` lays sequences out.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import can_return_tuple

IMAGE_TOKEN = "<image>"
MODALITY_TOKEN = "<modality>"
# Arguments of `EASConfig`: the vision tower's attentions have adapters and stay, what is new is trained as well, and
# there are the paper's adapters alone.
EAS_ARGUMENTS = {
    "target_modules": r".*(language_model|vision_tower).*self_attn",
    "kept_modules": r".*vision_tower.*self_attn",
    "modules_to_save": ["multi_modal_projector", "modality_embedding"],
    "output_r": 0,
}
# What the KV cache is called among arguments; transformers 5.24 has renamed it.
CACHE_KEY = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# Rows of the modality embedding.
TEXT_ONLY, WITH_IMAGE = 0, 1

_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


class LavinConfig(PreTrainedConfig):
    """Configuration of a LaVIN model.

    Args:
        text_config: of the language model, Llama or alike; a config, its dictionary, or None for Llama's defaults.
        vision_config: of the CLIP vision tower; likewise, and None for ViT-L/14.
        image_token_id, modality_token_id: stand in `input_ids` in the places of image tokens and modality token; they
            may lie within the language model's vocabulary or beyond it, for no embedding of theirs is looked up.
        vision_layer_interval: every how many vision layers the class token's state becomes an image token.
        projector_width: of the bottleneck between the widths of vision tower and language model.
    """

    model_type = "lavin"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    modality_token_id: int = 32001
    vision_layer_interval: int = 4
    projector_width: int = 128
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(self.text_config, "llama", {})
        self.vision_config = _sub_config(self.vision_config, "clip_vision_model", _VIT_L_14)
        self.tie_word_embeddings = bool(
            self.tie_word_embeddings or getattr(self.text_config, "tie_word_embeddings", False)
        )
        layers = self.vision_config.num_hidden_layers
        if not 1 <= self.vision_layer_interval <= layers:
            raise ValueError(
                f"LavinConfig(vision_layer_interval={self.vision_layer_interval!r}): must be from 1 to {layers}, the "
                "number of layers of the vision tower, so that there is an image token."
            )
        if self.image_token_id == self.modality_token_id:
            raise ValueError(
                f"LavinConfig(image_token_id={self.image_token_id}, modality_token_id={self.modality_token_id}): give "
                "the two placeholders different ids."
            )
        super().__post_init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        """How many tokens an image becomes."""
        return self.vision_config.num_hidden_layers // self.vision_layer_interval


def _sub_config(config: dict | PreTrainedConfig | None, model_type: str, defaults: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    given = defaults if config is None else dict(config)
    return CONFIG_MAPPING[given.pop("model_type", model_type) if config else model_type](**given)


class LavinProjector(nn.Module):
    """From the vision tower's width to the language model's: W2 SiLU(W1 x), (…, vision width) -> (…, text width)."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.projector_width)
        self.linear_2 = nn.Linear(config.projector_width, config.text_config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(states)))


@dataclass
class LavinModelOutput(BaseModelOutputWithPast):
    """With `image_hidden_states`, the projected image tokens (images, image tokens, width), or None."""

    image_hidden_states: Tensor | None = None


@dataclass
class LavinOutput(CausalLMOutputWithPast):
    """With `image_hidden_states`, the projected image tokens (images, image tokens, width), or None."""

    image_hidden_states: Tensor | None = None


class LavinPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = LavinConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]  # noqa: RUF012
    # The modality token needs a mask that is not only causal, which flash attention does not take.
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LavinProjector):
            for linear in (module.linear_1, module.linear_2):
                init.xavier_uniform_(linear.weight)
                init.zeros_(linear.bias)
        elif isinstance(module, LavinModel):
            init.normal_(module.modality_embedding.weight)


class LavinModel(LavinPreTrainedModel):
    """LaVIN without its language model's head."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LavinProjector(config)
        self.modality_embedding = nn.Embedding(2, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The tokens of images (images, 3, H, W): (images, image tokens, text width)."""
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        interval = self.config.vision_layer_interval  # states[i] is behind layer i, counted from 1
        return self.multi_modal_projector(torch.stack([state[:, 0] for state in states[interval::interval]], 1))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeds tokens (B, T) with the placeholders filled in: (B, T, width), and the image tokens or None.

        Raises:
            ValueError: if the images are not as many as the placeholders ask for.
        """
        is_image = input_ids == self.config.image_token_id
        is_modality = input_ids == self.config.modality_token_id
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_modality, 0))
        modality = self.modality_embedding(is_image.any(1).long())[:, None]  # TEXT_ONLY or WITH_IMAGE
        embeddings = torch.where(is_modality[..., None], modality.to(embeddings), embeddings)
        places = int(is_image.sum())
        if pixel_values is None and not places:
            return embeddings, None
        images = 0 if pixel_values is None else len(pixel_values)
        if images * self.config.num_image_tokens != places:
            raise ValueError(
                f"{images} images came with {places} image placeholders in input_ids; each image needs "
                f"{self.config.num_image_tokens}. Pass pixel_values of the samples that have an image, in their "
                "order, and lay the tokens out with LavinProcessor."
            )
        features = self.get_image_features(pixel_values)
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings)), features

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LavinModelOutput:
        """Computes the last hidden states.

        Args:
            input_ids: (B, T); the first token that is attended to is the modality placeholder.
            attention_mask: (B, S), 0 for padding, of the tokens in the cache and these; or a mask of 4 dimensions,
                which must hide the modality token already.
            pixel_values: (images, 3, H, W) of the samples with image placeholders, in their order.

        Raises:
            ValueError: if neither or both of input_ids and inputs_embeds are given, if a sequence does not start with
                the modality placeholder, or if images and placeholders do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LavinModel needs either input_ids or inputs_embeds. Give one of the two.")
        features = None
        past_key_values = kwargs.pop("cache", past_key_values)
        is_start = past_key_values is None or past_key_values.get_seq_length() == 0
        if inputs_embeds is None:
            if is_start and not torch.compiler.is_compiling():
                self._check_start(input_ids, attention_mask)
            inputs_embeds, features = self.embed(input_ids, pixel_values)
        if not is_start and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # No new token is the modality token, to which theirs is padding. As a function of the tokens' places the
            # mask takes transformers as long as some layers take for one token.
            first = _first_attended(attention_mask, len(attention_mask), attention_mask.device)
            mask = attention_mask.scatter(1, first[:, None], 0)
        else:
            mask = create_causal_mask(
                config=self.language_model.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE_KEY: past_key_values},
                position_ids=position_ids,
                and_mask_function=hides_modality_token(attention_mask, len(inputs_embeds), inputs_embeds.device),
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE_KEY: past_key_values},
            **kwargs,
        )
        return LavinModelOutput(**outputs, image_hidden_states=features)

    def _check_start(self, input_ids: Tensor, attention_mask: Any) -> None:
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            return
        first = _first_attended(attention_mask, len(input_ids), input_ids.device)[:, None]
        starts = input_ids.gather(1, first)
        if not (starts == self.config.modality_token_id).all():
            raise ValueError(
                f"A sequence starts with the token {int(starts[starts != self.config.modality_token_id][0])}, but the "
                f"first token that is attended to must be the modality placeholder, {self.config.modality_token_id}. "
                "Lay the tokens out with LavinProcessor."
            )


def _first_attended(attention_mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The place of the first attended token of each sequence: (B,)."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return attention_mask.to(device).bool().int().argmax(1)


def hides_modality_token(
    attention_mask: Tensor | None, batch: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A function for transformers' masks: whether a query may see a key, where the modality token sees only itself.

    Args:
        attention_mask: (B, S) with the padding of all tokens, in the cache and new; or None. One of 4 dimensions is
            used by transformers as it is, and the function not at all.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        attention_mask = None
    first = _first_attended(attention_mask, batch, device)

    def may_see(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx != first[batch_idx]) | (q_idx == kv_idx)

    return may_see


class LavinForConditionalGeneration(LavinPreTrainedModel, GenerationMixin):
    """LaVIN with its language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config)
        self.model = LavinModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        llm: PreTrainedModel,
        vision_tower: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vision_layer_interval: int = 4,
        projector_width: int = 128,
    ) -> "LavinForConditionalGeneration":
        """Puts a language model and a vision tower together; both are used as they are, not copied.

        Projector and modality embeddings start at random. The placeholders are added to the tokenizer where it lacks
        them; the language model's embeddings stay as they are, even if that makes the tokenizer larger.

        Args:
            llm: a `LlamaForCausalLM` or alike. vision_tower: a `CLIPVisionModel`.
            vision_layer_interval, projector_width: as in `LavinConfig`.
        """
        known = set(tokenizer.get_vocab())
        new = [token for token in (IMAGE_TOKEN, MODALITY_TOKEN) if token not in known]
        if new:
            tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
        config = LavinConfig(
            text_config=llm.config,
            vision_config=vision_tower.config,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            modality_token_id=tokenizer.convert_tokens_to_ids(MODALITY_TOKEN),
            vision_layer_interval=vision_layer_interval,
            projector_width=projector_width,
        )
        with torch.device("meta"):
            model = cls(config)
        weight = llm.get_input_embeddings().weight
        fresh = (model.model.multi_modal_projector, model.model.modality_embedding)
        for module in fresh:
            module.to_empty(device=weight.device).to(weight.dtype)
        model.model.language_model = llm.base_model
        model.model.vision_tower = vision_tower
        model.lm_head = llm.get_output_embeddings()
        for module in (fresh[0], model.model):
            model._init_weights(module)
        model.generation_config = copy.deepcopy(llm.generation_config)
        placeholders = (config.image_token_id, config.modality_token_id)
        model.generation_config.suppress_tokens = [i for i in placeholders if i < llm.config.vocab_size] or None
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @staticmethod
    def create_masks_for_generate(
        config: LavinConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask that `generate()` makes ahead of a pass with a static cache."""
        return create_causal_mask(
            config=config.get_text_config(),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_KEY: kwargs[CACHE_KEY]},
            position_ids=position_ids,
            and_mask_function=hides_modality_token(attention_mask, len(inputs_embeds), inputs_embeds.device),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        eas_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> LavinOutput:
        """Computes logits (B, T, vocabulary), and the loss on `labels` (B, T), which are -100 where nothing is learnt.

        Other arguments as in `LavinModel.forward`; `logits_to_keep` is how many of the last logits are wanted, 0 for
        all. `eas_prompt_mask`, which adapters take out of the inputs, is of no use to the model itself.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return LavinOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


AutoConfig.register(LavinConfig.model_type, LavinConfig, exist_ok=True)
AutoModel.register(LavinConfig, LavinModel, exist_ok=True)
AutoModelForImageTextToText.register(LavinConfig, LavinForConditionalGeneration, exist_ok=True)
