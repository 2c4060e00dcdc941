"""How the inputs of a LaVIN model are laid out, with its tokenizer and image processor."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from examples.lavin.modeling_lavin import IMAGE_TOKEN, MODALITY_TOKEN, LavinConfig

ROUTINGS = ("prompt", "modality")


class LavinProcessor(ProcessorMixin):
    """Lays out: modality token, BOS, "Image: " and the image's tokens or "Image: N/A", `separator`, the text.

    A tokenizer without a BOS token goes without it.

    Args:
        tokenizer: it must know the placeholders, as after `LavinForConditionalGeneration.from_parts`.
        image_processor: for the vision tower.
        num_image_tokens: how many tokens an image becomes (`LavinConfig.num_image_tokens`).
        routing: what the adapters of `peft_eas` route by: "prompt", the mean over the prompt, or "modality", the
            modality token's state, as in the released LaVIN; that adds `eas_prompt_mask` to what is returned.
        separator: between image and text. The released LaVIN has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        num_image_tokens: int = 6,
        routing: Literal["prompt", "modality"] = "prompt",
        separator: str = "\n",
        **kwargs: Any,
    ) -> None:
        if routing not in ROUTINGS:
            raise ValueError(f"LavinProcessor(routing={routing!r}): must be one of {', '.join(map(repr, ROUTINGS))}.")
        missing = [token for token in (IMAGE_TOKEN, MODALITY_TOKEN) if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer does not know {' and '.join(missing)}. Make the model with "
                "LavinForConditionalGeneration.from_parts(), which adds them, or load the tokenizer that was saved "
                "with the model."
            )
        self.num_image_tokens = num_image_tokens
        self.routing = routing
        self.separator = separator
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.modality_token_id = tokenizer.convert_tokens_to_ids(MODALITY_TOKEN)
        super().__init__(tokenizer, image_processor, **kwargs)

    def encode(self, text: str, has_image: bool) -> list[int]:
        """The ids of one sequence."""
        ids = [self.modality_token_id]
        if self.tokenizer.bos_token_id is not None:
            ids.append(self.tokenizer.bos_token_id)
        if has_image:
            ids += [*self.encode_plain("Image: "), *[self.image_token_id] * self.num_image_tokens]
        else:
            ids += self.encode_plain("Image: N/A")
        return ids + self.encode_plain(self.separator + text)

    def encode_answer(self, text: str, answer: str) -> list[int]:
        """The ids of `answer` behind `text`, as in those of both as one text; its own where an id joins the two."""
        before = self.encode_plain(self.separator + text)
        both = self.encode_plain(self.separator + text + answer)
        return both[len(before) :] if both[: len(before)] == before else self.encode_plain(answer)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text alone, without any special token, even if the text spells one."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> BatchFeature:
        """Makes a batch.

        Args:
            text: the sequences' texts. images: per sequence its image or None; a floating-point tensor (3, H, W) is
                taken for pixel values, and all else goes through the image processor.
            padding_side: "left" for generation.

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (images, 3, H, W) if there is any image, and
            `eas_prompt_mask` if `routing` asks for it.

        Raises:
            ValueError: if texts and images are not equally many.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = [None] * len(texts) if images is None else list(images)
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images came with {len(texts)} texts. Give one per text, None where it has no image."
            )
        rows = [self.encode(one, image is not None) for one, image in zip(texts, images, strict=True)]
        return self.batch(rows, images, padding_side)

    def batch(
        self, rows: Sequence[list[int]], images: Sequence[Any], padding_side: Literal["left", "right"] = "right"
    ) -> BatchFeature:
        """As the call, from sequences that `encode` has begun."""
        input_ids = pad([torch.tensor(row) for row in rows], self.pad_token_id, padding_side)
        attention_mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], 0, padding_side)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        pixel_values = [self.pixel_values(image) for image in images if image is not None]
        if pixel_values:
            batch["pixel_values"] = torch.stack(pixel_values)
        if self.routing == "modality":
            batch["eas_prompt_mask"] = input_ids == self.modality_token_id
        return BatchFeature(batch)

    @property
    def pad_token_id(self) -> int:
        """Fills up `input_ids`; hidden by the mask, so that any id but a placeholder's will do."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def pixel_values(self, image: Any) -> Tensor:
        """An image's pixel values, (3, H, W)."""
        if isinstance(image, Tensor) and image.is_floating_point():
            return image
        return self.image_processor(image, return_tensors="pt").pixel_values[0]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)


def pad(rows: list[Tensor], value: int, padding_side: Literal["left", "right"]) -> Tensor:
    """Rows of different lengths as one tensor, filled up with `value` on one side."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)


AutoProcessor.register(LavinConfig, LavinProcessor, exist_ok=True)
