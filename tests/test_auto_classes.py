"""Whoever has imported the package loads merged models of every type that the Auto classes know."""

import pytest
import torch
import transformers
from conftest import IMAGE_TOKEN, VOCAB
from peft import get_peft_model
from processes import run_alone
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_eas import EASConfig

_BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_BLOCKS, "vocab_size": VOCAB, "num_key_value_heads": 2, "pad_token_id": 0}
_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
_VISION = {**_BLOCKS, "image_size": 16, "patch_size": 8}
_PERCEIVER = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 4}
_AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}


def _llava_onevision() -> PreTrainedConfig:
    text, vision = transformers.Qwen2Config(**_TEXT), transformers.SiglipVisionConfig(**_VISION)
    return transformers.LlavaOnevisionConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)


def _idefics2() -> PreTrainedConfig:
    perceiver = {**_PERCEIVER, "resampler_head_dim": 8, "num_key_value_heads": 2}
    return transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**_TEXT),
        vision_config=_VISION,
        perceiver_config=perceiver,
        image_token_id=IMAGE_TOKEN,
    )


def _mistral3() -> PreTrainedConfig:
    text, vision = transformers.MistralConfig(**_TEXT), transformers.PixtralVisionConfig(**_VISION)
    return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)


def _video_llava() -> PreTrainedConfig:
    text, vision = transformers.LlamaConfig(**_TEXT), transformers.CLIPVisionConfig(**_VISION)
    return transformers.VideoLlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)


def _qwen2_audio() -> PreTrainedConfig:
    text = transformers.Qwen2Config(**_TEXT)
    return transformers.Qwen2AudioConfig(text_config=text, audio_config=_AUDIO, audio_token_index=IMAGE_TOKEN)


def _vision_encoder_decoder() -> PreTrainedConfig:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}
    decoder = transformers.GPT2Config(**sizes, add_cross_attention=True, is_decoder=True)
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_VISION), decoder
    )


# None of them has a test of its own beside this one. By class: what makes its config, and an Auto class for it.
MODELS = {
    "LlavaOnevisionForConditionalGeneration": (_llava_onevision, "AutoModelForImageTextToText"),
    "Idefics2ForConditionalGeneration": (_idefics2, "AutoModelForImageTextToText"),
    "Mistral3ForConditionalGeneration": (_mistral3, "AutoModelForImageTextToText"),
    "VideoLlavaForConditionalGeneration": (_video_llava, "AutoModelForImageTextToText"),
    "Qwen2AudioForConditionalGeneration": (_qwen2_audio, "AutoModelForMultimodalLM"),
    "VisionEncoderDecoderModel": (_vision_encoder_decoder, "AutoModelForImageTextToText"),
}
SCRIPT = """
import sys, torch, transformers, peft_eas
for folder, auto_class in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    assert type(model).__module__ == "peft_eas.runtime.merged", type(model)
    inputs, expected = torch.load(f"{folder}/expected.pt")
    assert torch.equal(model(**inputs).logits, expected), folder
"""


@torch.no_grad()
def test_merged_models_of_any_type_load_with_the_import_alone(tmp_path):
    arguments = []
    for name, (make_config, auto_class) in MODELS.items():
        torch.manual_seed(0)
        base = getattr(transformers, name)(make_config()).eval()
        inputs = {"input_ids": torch.randint(1, IMAGE_TOKEN - 2, (2, 7))}
        if name == "VisionEncoderDecoderModel":
            inputs = {"decoder_input_ids": inputs["input_ids"], "pixel_values": torch.randn(2, 3, 16, 16)}
        mhas = get_peft_model(base, EASConfig(num_skip=0)).candidates
        base = getattr(transformers, name)(make_config()).eval()
        config = EASConfig(skipped_modules=mhas[:1], context="running", init_weights=False, r=8, attention_r=4)
        model = get_peft_model(base, config).eval()
        before = model(**inputs).logits
        merged = model.merge_and_unload()
        expected = merged(**inputs).logits
        torch.testing.assert_close(expected, before, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / name)
        torch.save((inputs, expected), tmp_path / name / "expected.pt")
        arguments += [str(tmp_path / name), auto_class]
    run_alone(SCRIPT, *arguments, folder=tmp_path)


def test_every_type_that_the_auto_classes_know_has_a_merged_one():
    for model_type in ("llama", "olmo", "xlm-roberta"):
        merged_type = f"eas_{model_type}"
        assert merged_type in CONFIG_MAPPING
        assert CONFIG_MAPPING[merged_type].model_type == merged_type
        assert issubclass(CONFIG_MAPPING[merged_type], CONFIG_MAPPING[model_type])
        assert CONFIG_MAPPING[merged_type] is CONFIG_MAPPING[merged_type]
    for unknown in ("eas_", "eas_nothing", "nothing", None):
        assert unknown not in CONFIG_MAPPING
        with pytest.raises(KeyError):
            CONFIG_MAPPING[unknown]


def test_a_type_that_is_registered_later():
    assert "eas_late" not in CONFIG_MAPPING
    for model_class in (transformers.LlamaConfig, transformers.GPT2Config):  # the later one counts
        late = type("LateConfig", (model_class,), {"model_type": "late"})
        AutoConfig.register("late", late, exist_ok=True)
        assert issubclass(CONFIG_MAPPING["eas_late"], late)
    del CONFIG_MAPPING._extra_content["late"]
    assert "eas_late" not in CONFIG_MAPPING
