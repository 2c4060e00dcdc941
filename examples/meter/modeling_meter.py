"""METER (Dou et al., arXiv 2111.02387) on transformers' CLIP vision and RoBERTa models.

Two encoders, one per modality, and behind them two towers of `num_cross_layers` co-attention layers. A layer of either
tower has a self-attention, a cross-attention to the other tower and an FFN, with the norms behind them (post-norm).
Both layers of one depth read what the other tower held *before* that depth, so neither comes first. A pooler per tower
reads its first token; the two together, text first, are what every head reads.

The co-attention layers are transformers' `BridgeTowerBertCrossLayer`, which is METER's block. `MeterConfig()` has the
shapes of the released model: CLIP ViT-B/16 without its last layer, at 288 pixels, and RoBERTa-base.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer
from transformers.utils import ModelOutput

# For EASConfig(target_modules=...): the MHAs of the co-attention layers, and none of the two encoders'.
CROSS_MODAL_MHAS = r".*cross_modal_(text|image)_layers\.\d+\.(attention|crossattention)"


class MeterConfig(PreTrainedConfig):
    """The configuration of METER.

    Args:
        vision_config, text_config: of the encoders, as configs or dictionaries. Their layers are all computed.
        hidden_size, num_attention_heads, intermediate_size, hidden_act, hidden_dropout_prob,
            attention_probs_dropout_prob, layer_norm_eps: of the co-attention layers.
        num_cross_layers: co-attention layers of each tower.
        type_vocab_size: token types: the text, the image and, of a model for pairs, the second image.
        initializer_range: standard deviation of what is drawn anew.
    """

    model_type = "meter"
    sub_configs: ClassVar = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_cross_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 3
    initializer_range: float = 0.02
    # Read by the co-attention layers.
    is_decoder: bool = False
    add_cross_attention: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = {"image_size": 288, "patch_size": 16, "num_hidden_layers": 11}
        if self.text_config is None:
            self.text_config = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        if isinstance(self.text_config, dict):
            self.text_config = RobertaConfig(**self.text_config)
        super().__post_init__(**kwargs)


@dataclass
class MeterModelOutput(ModelOutput):
    """What the body returns.

    Attributes:
        text_hidden_states, image_hidden_states: of the last co-attention layers, (B, tokens, width).
        pooler_output: both towers' pooled first tokens, the text's first, (B, 2 width).
    """

    text_hidden_states: Tensor | None = None
    image_hidden_states: Tensor | None = None
    pooler_output: Tensor | None = None


@dataclass
class MeterPreTrainingOutput(ModelOutput):
    """What `MeterForPreTraining` returns.

    Attributes:
        loss: the sum of the losses of what is labelled. itm_logits: (B, 2). mlm_logits: (B, tokens, vocabulary).
    """

    loss: Tensor | None = None
    itm_logits: Tensor | None = None
    mlm_logits: Tensor | None = None


@dataclass
class MeterRetrievalOutput(ModelOutput):
    """What `MeterForImageTextRetrieval` returns.

    Attributes:
        loss: see there. logits: scores of the texts, (B, K). itm_logits: of the pairs, (B, K, 2).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    itm_logits: Tensor | None = None


class MeterPooler(nn.Module):
    """tanh(W x + b) of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class MeterITMHead(nn.Module):
    """Whether image and text match: two logits, for no and for yes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)


class MeterMLMTransform(nn.Module):
    """LayerNorm(GELU(W x + b))."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(nn.functional.gelu(self.dense(hidden_states)))


class MeterMLMHead(nn.Module):
    """The words behind the masks: logits over the vocabulary."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.transform = MeterMLMTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.text_config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.text_config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states)) + self.bias


def build_classifier(in_features: int, hidden: int, classes: int) -> nn.Sequential:
    """The head of the classification tasks."""
    return nn.Sequential(nn.Linear(in_features, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))


class MeterPreTrainedModel(PreTrainedModel):
    """What all METER models share."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # the losses are means over a batch, whatever else Trainer accumulates
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["BridgeTowerBertCrossLayer", "CLIPEncoderLayer", "RobertaLayer"]
    # The heads of the pretraining are not every task's.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^(itm_score|mlm_score)\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MeterMLMHead):
            init.zeros_(module.bias)


class MeterModel(MeterPreTrainedModel):
    """METER without a head."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.text_model = RobertaModel(config.text_config, add_pooling_layer=False)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, width)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.cross_modal_text_layers = self._build_tower(config)
        self.cross_modal_image_layers = self._build_tower(config)
        self.cross_modal_text_pooler = MeterPooler(width)
        self.cross_modal_image_pooler = MeterPooler(width)
        self.post_init()

    @staticmethod
    def _build_tower(config: MeterConfig) -> nn.ModuleList:
        layers = nn.ModuleList(BridgeTowerBertCrossLayer(config) for _ in range(config.num_cross_layers))
        for layer in layers:
            # BridgeTower says causal, as it always has a mask that overrides it. Here no mask means all tokens.
            layer.attention.self.is_causal = False
        return layers

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _token_types(self, first: int, number: int) -> Tensor:
        """(number, width). The module is called, as an adapter may have put another in its place."""
        indices = torch.arange(first, first + number, device=self.token_type_embeddings.weight.device)
        return self.token_type_embeddings(indices)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What the text tower starts with, (B, T, width)."""
        hidden_states = self.text_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.cross_modal_text_transform(hidden_states) + self._token_types(0, 1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """What the image tower starts with but for its token type, (B, S, width)."""
        hidden_states = self.vision_model(pixel_values).last_hidden_state
        # CLIP norms the first token alone; METER reads them all.
        return self.cross_modal_image_transform(self.vision_model.post_layernorm(hidden_states))

    def fuse(self, text: Tensor, attention_mask: Tensor | None, image: Tensor, **kwargs: Any) -> MeterModelOutput:
        """The two towers behind `encode_text` and `encode_image`, and the poolers.

        Args:
            text: (B, T, width). attention_mask: of the text, (B, T). image: with its token type, (B, S, width).
        """
        mask = {"config": self.config, "attention_mask": attention_mask}
        text_mask = create_bidirectional_mask(inputs_embeds=text, **mask)
        image_to_text_mask = create_bidirectional_mask(inputs_embeds=image, encoder_hidden_states=text, **mask)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = (
                text_layer(text, image, attention_mask=text_mask, **kwargs)[0],
                image_layer(image, text, encoder_attention_mask=image_to_text_mask, **kwargs)[0],
            )
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)
        return MeterModelOutput(text, image, pooled)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> MeterModelOutput:
        """Computes pairs of an image and a text.

        Args:
            input_ids, attention_mask: the texts, (B, T), or (B, K, T) for K texts of each image.
            pixel_values: the images, (B, 3, H, W), or (B, N, 3, H, W) for N images of each text, each with a token
                type of its own. Each image and each text is encoded once.

        Returns:
            Output for B, B K or B N pairs, those of one image or text next to each other.

        Raises:
            ValueError: for other images than of each sample, for several texts and several images at once, and for
                more images than there are token types.
        """
        if pixel_values is None or len(pixel_values) != len(input_ids):
            given = "no pixel_values" if pixel_values is None else f"images of {len(pixel_values)} samples"
            raise ValueError(f"{given} were received with {len(input_ids)} texts. Give each sample's text and image.")
        texts, images = input_ids.flatten(0, -2), pixel_values.flatten(0, -4)
        text_masks = None if attention_mask is None else attention_mask.flatten(0, -2)
        num_texts, num_images = len(texts) // len(pixel_values), len(images) // len(pixel_values)
        if min(num_texts, num_images) > 1 or num_images >= self.config.type_vocab_size:
            raise ValueError(
                f"{num_texts} texts and {num_images} images were received for each sample. Give several texts with "
                f"one image, or with one text at most as many images as there are token types for them "
                f"({self.config.type_vocab_size - 1}; see MeterConfig.type_vocab_size)."
            )
        text = self.encode_text(texts, text_masks).repeat_interleave(num_images, 0)
        text_masks = None if text_masks is None else text_masks.repeat_interleave(num_images, 0)
        token_types = self._token_types(1, num_images)[:, None]
        image = (self.encode_image(images).unflatten(0, (-1, num_images)) + token_types).flatten(0, 1)
        return self.fuse(text, text_masks, image.repeat_interleave(num_texts, 0), **kwargs)


class MeterForPreTraining(MeterPreTrainedModel):
    """METER with the heads of its pretraining: whether image and text match, and the words behind masks."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.itm_score = MeterITMHead(2 * config.hidden_size)
        self.mlm_score = MeterMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        itm_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MeterPreTrainingOutput:
        """Takes pairs as `MeterModel`; `labels` are the words behind masks, else -100, `itm_labels` 0 or 1."""
        output = self.meter(input_ids, attention_mask, pixel_values, **kwargs)
        itm_logits = self.itm_score(output.pooler_output)
        mlm_logits = self.mlm_score(output.text_hidden_states)
        losses = []
        if labels is not None:
            losses.append(nn.functional.cross_entropy(mlm_logits.flatten(0, 1), labels.flatten()))
        if itm_labels is not None:
            losses.append(nn.functional.cross_entropy(itm_logits, itm_labels.flatten()))
        return MeterPreTrainingOutput(sum(losses) if losses else None, itm_logits, mlm_logits)


class MeterForVisualQuestionAnswering(MeterPreTrainedModel):
    """METER that chooses among `config.num_labels` answers."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        width = 2 * config.hidden_size
        self.vqa_classifier = build_classifier(width, width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Takes pairs as `MeterModel`; `labels` are the answers' scores in [0, 1], (B, answers).

        The loss is the binary cross-entropy, averaged over the samples and summed over the answers.
        """
        logits = self.vqa_classifier(self.meter(input_ids, attention_mask, pixel_values, **kwargs).pooler_output)
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits)) * labels.shape[1]
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """METER for NLVR2: whether a text is true of a pair of images (`config.num_labels` classes, by default 2).

    Raises:
        ValueError: if the config has no token type for the second image.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        if config.type_vocab_size < 3:
            raise ValueError(
                f"MeterConfig(type_vocab_size={config.type_vocab_size}) has no token type for the second image of a "
                "pair. Set it to 3, and start the third embedding as a copy of the second, as "
                "`python -m examples.meter.convert --pairs` does."
            )
        self.meter = MeterModel(config)
        self.nlvr2_classifier = build_classifier(4 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Takes texts, (B, T), and pairs of images, the left one first, (B, 2, 3, H, W); `labels` are classes, (B,).

        The text is computed with each image apart, and the classifier reads both results, the left one's first.

        Raises:
            ValueError: for anything but pairs of images.
        """
        if pixel_values is not None and (pixel_values.dim() != 5 or pixel_values.shape[1] != 2):
            raise ValueError(
                f"pixel_values were received in the shape {tuple(pixel_values.shape)}. Give pairs of images, (batch, "
                "2, 3, height, width)."
            )
        pooled = self.meter(input_ids, attention_mask, pixel_values, **kwargs).pooler_output
        logits = self.nlvr2_classifier(pooled.unflatten(0, (-1, 2)).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForImageTextRetrieval(MeterPreTrainedModel):
    """METER that ranks the texts of an image, and by the same scores the images of a text.

    Where a checkpoint has no ranking head, it starts as what the ITM head says for "yes".
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.itm_score = MeterITMHead(2 * config.hidden_size).requires_grad_(False)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.rank_output:  # the ITM head, which comes before it, is there already
            init.copy_(module.weight, self.itm_score.fc.weight[1:])
            init.copy_(module.bias, self.itm_score.fc.bias[1:])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MeterRetrievalOutput:
        """Takes images, (B, 3, H, W), and K texts of each, (B, K, T); `labels` say which of them fits, (B,).

        The loss is the cross-entropy over the texts of an image.
        """
        pooled = self.meter(input_ids, attention_mask, pixel_values, **kwargs).pooler_output
        pooled = pooled.unflatten(0, (len(pixel_values), -1))
        scores = self.rank_output(pooled).squeeze(-1)
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return MeterRetrievalOutput(loss, scores, self.itm_score(pooled))


AutoConfig.register(MeterConfig.model_type, MeterConfig, exist_ok=True)
AutoModel.register(MeterConfig, MeterModel, exist_ok=True)
AutoModelForPreTraining.register(MeterConfig, MeterForPreTraining, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(MeterConfig, MeterForVisualQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(MeterConfig, MeterForImagesAndTextClassification, exist_ok=True)
# It chooses among the texts of an image, given and scored as there.
AutoModelForMultipleChoice.register(MeterConfig, MeterForImageTextRetrieval, exist_ok=True)
