"""LaVIN of examples/lavin: what it computes, with adapters and without, in generation, merged, saved and loaded."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import difference, needs_easy_vqa
from peft import PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.lavin.modeling_lavin import (
    EAS_ARGUMENTS,
    IMAGE_TOKEN,
    MODALITY_TOKEN,
    LavinConfig,
    LavinForConditionalGeneration,
    LavinModel,
)
from examples.lavin.processing_lavin import LavinProcessor
from examples.lavin.samples import IGNORE, LavinCollator, Sample
from peft_eas import EASCallback, EASConfig

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    *["Image", "N/A", "what", "color", "shape", "is", "it", "this", "a", "big", "red", "blue", "circle", ":", "?"],
]
WIDTH, LAYERS, HEADS, VISION_WIDTH, VISION_LAYERS, INTERVAL = 32, 3, 4, 16, 4, 2
TEXT = {
    **{"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": 2, "initializer_range": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VISION = {
    **{"hidden_size": VISION_WIDTH, "intermediate_size": 24, "num_hidden_layers": VISION_LAYERS},
    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
}
FIRST, LAST = (f"model.language_model.layers.{i}.self_attn" for i in (0, LAYERS - 1))
SKIPS = {"none": [], "two": [FIRST, LAST]}
ROUTINGS = ["prompt", "modality"]
TOLERANCE = 1e-5


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{kind}_token": f"<{kind}>" for kind in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_lavin(**text) -> tuple[LavinForConditionalGeneration, LavinProcessor]:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**TEXT | text))
    tokenizer = make_tokenizer()
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION, initializer_factor=4.0))
    model = LavinForConditionalGeneration.from_parts(llm, tower, tokenizer, INTERVAL, projector_width=6)
    with torch.no_grad():  # so that biases and norms show
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return model, LavinProcessor(tokenizer, image_processor, model.config.num_image_tokens)


@pytest.fixture(scope="module")
def lavin():
    return make_lavin()


def adapted(base: torch.nn.Module, skip: str = "none", **config) -> PeftModel:
    """With random adapters, everywhere but where `skip` says."""
    torch.manual_seed(1)
    options = {"init_weights": False, "r": 8, "attention_r": 4, "dropout": 0.0, "router_temperature": 0.5}
    config = EASConfig(
        task_type="CAUSAL_LM",
        skipped_modules=SKIPS[skip],
        **EAS_ARGUMENTS,
        **{**options, **config},
    )
    return get_peft_model(copy.deepcopy(base), config).eval()


def image(seed: int) -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


SAMPLES = [
    Sample("what color is it ?", " red", image(0)),
    Sample("is this a big blue circle ?", " a red circle"),
    Sample("what shape ?", " circle", image(1)),
]


def batches(processor: LavinProcessor, routing: str = "prompt", **options) -> tuple[dict, list[dict]]:
    """All samples together, and one by one."""
    processor = copy.copy(processor)
    processor.routing = routing
    collate = LavinCollator(processor, **options)
    return collate(SAMPLES), [collate([sample]) for sample in SAMPLES]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_layout(lavin):
    model, processor = lavin
    assert (model.config.image_token_id, model.config.modality_token_id) == (len(WORDS), len(WORDS) + 1)
    image_token, modality = len(WORDS), len(WORDS) + 1
    ids = {word: i for i, word in enumerate(WORDS)}
    unknown = ids["<unk>"]  # "Image:" and "N/A" are each a word here
    batch = processor(["what color", "shape"], [image(0), None])
    expected = [modality, 1, unknown, image_token, image_token, ids["what"], ids["color"]]
    assert batch["input_ids"].tolist()[0] == expected
    assert batch["input_ids"].tolist()[1] == [modality, 1, unknown, ids["N/A"], ids["shape"], 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert "eas_prompt_mask" not in batch
    assert "pixel_values" not in processor(["shape"])


def test_a_text_that_spells_a_placeholder_is_text(lavin):
    _, processor = lavin
    placeholders = [processor.image_token_id, processor.modality_token_id]
    (ids,) = processor(["what <image> color <modality>"], [image(0)])["input_ids"].tolist()
    assert [i for i in ids if i in placeholders] == [placeholders[1], *[placeholders[0]] * processor.num_image_tokens]


def test_samples(lavin):
    _, processor = lavin
    batch, ones = batches(processor, "modality")
    for row, one, sample in zip(batch["labels"], ones, SAMPLES, strict=True):
        learnt = row[row != IGNORE]
        assert learnt.tolist() == [*processor.encode_plain(sample.answer), 2]
        length = one["input_ids"].shape[1]
        assert torch.equal(row[:length], one["labels"][0])
        assert one["labels"][0, -len(learnt) :].tolist() == learnt.tolist()
    assert batch["eas_prompt_mask"].sum(1).tolist() == [1, 1, 1]
    prompts, _ = batches(processor, padding_side="left", prompt_only=True)
    assert "labels" not in prompts
    assert prompts["attention_mask"][:, -1].tolist() == [1, 1, 1]


def test_pictures_are_processed(lavin):
    _, processor = lavin
    picture = Image.new("RGB", (40, 20), "red")
    expected = processor.image_processor(picture, return_tensors="pt").pixel_values
    assert torch.equal(processor(["what"], [picture])["pixel_values"], expected)


def test_placeholders_lie_anywhere(lavin):
    model, processor = lavin
    batch, _ = batches(processor)
    expected = model(**batch).logits
    moved = copy.deepcopy(model)
    ids = batch["input_ids"].clone()
    for name, old, new in (("image_token_id", len(WORDS), 38), ("modality_token_id", len(WORDS) + 1, 1000)):
        setattr(moved.config, name, new)
        ids[batch["input_ids"] == old] = new
    assert torch.equal(moved(**{**batch, "input_ids": ids}).logits, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b.pop("pixel_values"), r"0 images came with 4 image placeholders.*needs 2.*pixel_values"),
        (lambda b: b.update(pixel_values=b["pixel_values"][:1]), r"1 images came with 4 image placeholders"),
        (lambda b: b.update(input_ids=b["input_ids"][:, 1:], attention_mask=b["attention_mask"][:, 1:]),
         r"starts with the token 1, but.*modality placeholder, \d+.*LavinProcessor"),
        (lambda b: b.update(inputs_embeds=torch.zeros(3, 4, WIDTH)), r"either input_ids or inputs_embeds"),
    ],
    ids=["no images", "too few", "no modality token", "both"],
)  # fmt: skip
def test_inputs_that_do_not_fit(lavin, change, match):
    model, processor = lavin
    batch, _ = batches(processor)
    batch.pop("labels")
    change(batch)
    with pytest.raises(ValueError, match=match):
        model(**batch)


def test_options_that_do_not_fit(lavin):
    _, processor = lavin
    with pytest.raises(ValueError, match=r"routing='all'.*'prompt', 'modality'"):
        LavinProcessor(processor.tokenizer, None, routing="all")
    with pytest.raises(ValueError, match=r"does not know <image> and <modality>.*from_parts"):
        LavinProcessor(make_tokenizer(), None)
    with pytest.raises(ValueError, match=r"1 images came with 2 texts"):
        processor(["what", "is"], [None])
    with pytest.raises(ValueError, match=r"vision_layer_interval=5.*from 1 to 4"):
        LavinConfig(text_config=TEXT, vision_config=VISION, vision_layer_interval=5)
    with pytest.raises(ValueError, match=r"two placeholders different ids"):
        LavinConfig(image_token_id=7, modality_token_id=7)


# --- what it computes ------------------------------------------------------------------------------------------------


def adapter_by_hand(adapter, z, context, temperature):
    """z + sum_e g_e (U_e (C z + c) + b_e), U_e in two diagonal blocks, per sequence of its context (B, d)."""
    gates = torch.softmax((context @ adapter.router.weight.T + adapter.router.bias) / temperature, -1)
    inner = z @ adapter.token_down.weight.T + adapter.token_down.bias
    update = 0
    for path in range(2):
        half = adapter.up[path].weight.shape[0] // 2
        rank = inner.shape[-1] // 2
        up = torch.block_diag(adapter.up[path].weight[:half], adapter.up[path].weight[half:])
        assert up.shape == (2 * half, 2 * rank)
        update = update + gates[:, path, None, None] * (inner @ up.T + adapter.up[path].bias)
    return z + update


def attention_by_hand(q, k, v, visible):
    """(B, heads, T, head width) each; `visible` (B, T, T) or None."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return (torch.softmax(scores, -1).nan_to_num() @ v).transpose(1, 2).flatten(2)


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x):
    """Llama's rotary embedding of x, (B, heads, T, d), of which dimensions i and i + d/2 are a pair."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] / 10000.0 ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def rms(x, norm):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def adapter_of(layer):
    return layer.self_attn.adapters["default"] if hasattr(layer.self_attn, "adapters") else None


def lavin_by_hand(model, batch, contexts, temperature=0.5):
    """LaVIN's logits, for a batch that is padded on the right.

    `contexts(z)` is what the text routers read, (B, d); the vision routers read the mean over the image.
    """
    tower, llm = model.model.vision_tower, model.model.language_model
    x = F.conv2d(batch["pixel_values"], tower.embeddings.patch_embedding.weight, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([tower.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
    x = tower.pre_layrnorm(x + tower.embeddings.position_embedding.weight)
    tokens = []
    for i, layer in enumerate(tower.encoder.layers):
        z, mha = layer.layer_norm1(x), layer.self_attn
        if adapter_of(layer) is not None:
            z = adapter_by_hand(adapter_of(layer), z, z.mean(1), temperature)
        x = x + mha.out_proj(attention_by_hand(*(split(p(z), 2) for p in (mha.q_proj, mha.k_proj, mha.v_proj)), None))
        hidden = layer.mlp.fc1(layer.layer_norm2(x))
        x = x + layer.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
        if (i + 1) % INTERVAL == 0:
            tokens.append(x[:, 0])
    projector = model.model.multi_modal_projector
    tokens = projector.linear_2(F.silu(projector.linear_1(torch.stack(tokens, 1))))

    h, images = [], iter(tokens)
    for row in batch["input_ids"].tolist():
        places = [i for i, token in enumerate(row) if token == model.config.image_token_id]
        states = [llm.embed_tokens.weight[0 if token >= len(WORDS) else token] for token in row]
        states[0] = model.model.modality_embedding.weight[1 if places else 0]
        if places:
            for place, token in zip(places, next(images), strict=True):
                states[place] = token
        h.append(torch.stack(states))
    h = torch.stack(h)
    length = h.shape[1]
    visible = torch.ones(length, length).tril().bool() & batch["attention_mask"].bool()[:, None]
    visible[:, 1:, 0] = False
    for layer in llm.layers:
        z, mha = rms(h, layer.input_layernorm), layer.self_attn
        if adapter_of(layer) is not None:
            z = adapter_by_hand(adapter_of(layer), z, contexts(z), temperature)
        q, k, v = rotate(split(mha.q_proj(z), HEADS)), rotate(split(mha.k_proj(z), 2)), split(mha.v_proj(z), 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        h = h + mha.o_proj(attention_by_hand(q, k, v, visible))
        z = rms(h, layer.post_attention_layernorm)
        h = h + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(z)) * layer.mlp.up_proj(z))
    return model.lm_head(rms(h, llm.norm))


def attended(tensor, batch):
    return tensor[batch["attention_mask"].bool()]


def test_the_base_is_lavin_without_adapters(lavin):
    model, processor = lavin
    batch, _ = batches(processor)
    expected = lavin_by_hand(model, batch, None)
    assert difference(attended(model(**batch).logits, batch), attended(expected, batch)) <= TOLERANCE


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_skipped_is_lavin(lavin, routing):
    base, processor = lavin
    model = adapted(base, num_skip=0)
    batch, _ = batches(processor, routing)
    is_prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)

    def contexts(z):
        if routing == "modality":
            return z[:, 0]
        return torch.stack([states[mask].mean(0) for states, mask in zip(z, is_prompt, strict=True)])

    expected = attended(lavin_by_hand(model.get_base_model(), batch, contexts), batch)
    assert difference(attended(model(**batch).logits, batch), expected) <= TOLERANCE
    other = lavin_by_hand(model.get_base_model(), batch, lambda z: z.mean(1))
    assert difference(attended(other, batch), expected) > 1e-3  # it would show


def test_as_many_parameters_as_the_paper_says():
    """3.8 million for LaVIN-7B (arXiv 2305.15023, table 1)."""
    with torch.device("meta"):
        base = LavinForConditionalGeneration(LavinConfig())
        model = get_peft_model(base, EASConfig(num_skip=0, **EAS_ARGUMENTS))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_781_296
    assert base.config.num_image_tokens == 6


def test_nobody_attends_to_the_modality_token(lavin):
    model, processor = copy.deepcopy(lavin[0]), lavin[1]
    model.set_attn_implementation("eager")
    batch, _ = batches(processor, padding_side="left")
    expected = model(**batch, output_attentions=True)
    first = batch["attention_mask"].argmax(1)
    for weights in expected.attentions:
        for row, place in zip(weights, first.tolist(), strict=True):
            column = row[:, place:, place]
            assert torch.equal(column[:, 0], torch.ones(HEADS))
            assert torch.equal(column[:, 1:], torch.zeros_like(column[:, 1:]))
    with torch.no_grad():
        model.model.modality_embedding.weight.normal_()
    changed = model(**batch).logits
    others = batch["attention_mask"].bool()
    others[torch.arange(3), first] = False
    assert torch.equal(changed[others], expected.logits[others])
    assert not torch.allclose(changed[torch.arange(3), first], expected.logits[torch.arange(3), first])


def test_identity_start(lavin):
    base, processor = lavin
    batch, _ = batches(processor)
    model = adapted(base, init_weights=True)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    model = adapted(base, "two")
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("skip", SKIPS)
def test_logits_do_not_depend_on_later_tokens_of_the_answer(lavin, skip, routing):
    model = adapted(lavin[0], skip)
    batch, _ = batches(lavin[1], routing)
    expected = model(**batch).logits
    is_answer = batch["labels"] != IGNORE
    changed = {**batch, "input_ids": torch.where(is_answer, 9, batch["input_ids"])}
    changed["labels"] = torch.where(is_answer, 9, batch["labels"])
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    actual = model(**changed).logits
    before = batch["attention_mask"].bool() & ~is_answer
    assert torch.equal(actual[before], expected[before])
    assert not torch.equal(actual[is_answer], expected[is_answer])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_mixed_batch_is_its_samples_one_by_one(lavin, skip, routing, padding_side):
    model = adapted(lavin[0], skip)
    batch, ones = batches(lavin[1], routing, padding_side=padding_side)
    together = model(**batch).logits
    for row, mask, one in zip(together, batch["attention_mask"].bool(), ones, strict=True):
        assert difference(row[mask], model(**one).logits[0]) <= TOLERANCE


def test_gradients(lavin):
    model = adapted(lavin[0], "two").train()
    batch, _ = batches(lavin[1])
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("modality_embedding", "linear_1", "vision_tower", "eas_pia", "layers.1.self_attn.eas_input"):
        assert any(part in name for name in trained), part
    assert model.base_model.candidates == [f"model.language_model.layers.{i}.self_attn" for i in range(LAYERS)]


# --- generation ------------------------------------------------------------------------------------------------------


def generate(model, batch, **options):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "disable_compile": True, **options}
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_generation(lavin, skip, routing):
    """Cached = uncached = a static cache = one by one, for a batch that is padded on the left; and with beams."""
    model = adapted(lavin[0], skip)
    batch, ones = batches(lavin[1], routing, padding_side="left", prompt_only=True)
    cached = generate(model, batch)
    length = batch["input_ids"].shape[1]
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        other = generate(model, batch, **options)
        assert torch.equal(other.sequences, cached.sequences), options
        assert difference(torch.stack(other.logits), torch.stack(cached.logits)) <= TOLERANCE
    for i, one in enumerate(ones):
        alone = generate(model, one)
        new = cached.sequences[i, length:]
        assert torch.equal(alone.sequences[0, one["input_ids"].shape[1] :], new)
        assert difference(torch.stack(alone.logits)[:, 0], torch.stack(cached.logits)[:, i]) <= TOLERANCE
    beams = generate(model, batch, num_beams=3)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, batch, num_beams=3, **options).sequences, beams.sequences), options
    merged = model.merge_and_unload(context="prompt")
    assert torch.equal(generate(merged, batch).sequences, cached.sequences)


def test_generation_with_eager_attention(lavin):
    model, processor = copy.deepcopy(lavin[0]), lavin[1]
    batch, _ = batches(processor, "modality", padding_side="left", prompt_only=True)
    expected = generate(model, batch)
    model.set_attn_implementation("eager")
    for options in ({}, {"cache_implementation": "static"}):
        actual = generate(model, batch, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) <= TOLERANCE


def test_attention_that_cannot_hide_the_modality_token_is_refused(lavin):
    with pytest.raises(ValueError, match="Flash Attention"):
        copy.deepcopy(lavin[0]).set_attn_implementation("flash_attention_2")


# --- merged, saved, trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["running", "prompt"])
@pytest.mark.parametrize("skip", SKIPS)
def test_merged_is_unmerged(lavin, skip, context, tmp_path):
    model = adapted(lavin[0], skip)
    batch, _ = batches(lavin[1], padding_side="left")
    if context == "running":
        model.train()(**batch)
        model.base_model.freeze_context()
        model.eval()
    expected = attended(model(**batch).logits, batch)
    merged = model.merge_and_unload(context=context)
    assert difference(attended(merged(**batch).logits, batch), expected) <= TOLERANCE
    merged.save_pretrained(tmp_path, processing_class=lavin[1])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == "EASLavinForConditionalGeneration"
    assert difference(attended(loaded(**batch).logits, batch), expected) <= TOLERANCE
    assert (tmp_path / "modeling_lavin.py").exists()
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "README.md").read_text()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), LavinProcessor)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tied, tmp_path):
    base, processor = make_lavin(tie_word_embeddings=tied)
    batch, _ = batches(processor)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded(**batch).logits, base(**batch).logits)
    assert loaded.generation_config.eos_token_id == 2
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert isinstance(AutoModel.from_pretrained(tmp_path / "base"), LavinModel)
    again = AutoProcessor.from_pretrained(tmp_path / "base")
    assert (again.num_image_tokens, again.routing, again.separator) == (2, "prompt", "\n")
    assert torch.equal(again(["what ?"], [image(0)])["input_ids"], processor(["what ?"], [image(0)])["input_ids"])
    assert {IMAGE_TOKEN, MODALITY_TOKEN} <= set(again.tokenizer.get_vocab())
    model = adapted(base, "two")
    model.save_pretrained(tmp_path / "adapter")
    model_again = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert torch.equal(model_again(**batch).logits, model(**batch).logits)


def test_trainer(lavin, tmp_path):
    """A search under Trainer with the modality token marked; the frozen model is what is merged."""
    processor = copy.copy(lavin[1])
    processor.routing = "modality"
    torch.manual_seed(0)
    config = EASConfig(task_type="CAUSAL_LM", num_skip=1, r=4, attention_r=2, dropout=0.0, **EAS_ARGUMENTS)
    model = get_peft_model(copy.deepcopy(lavin[0]), config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    collate = LavinCollator(processor)
    callback = EASCallback(reward_dataset=SAMPLES, search_steps=4, warmup_steps=1, interval=1)
    trainer = Trainer(model, arguments, train_dataset=SAMPLES * 3, data_collator=collate, callbacks=[callback])
    trainer.train()
    model.eval()
    assert len(model.base_model.skipped_modules) == 1
    batch = collate(SAMPLES)
    expected = attended(model(**batch).logits, batch)
    merged = model.merge_and_unload()
    assert difference(attended(merged(**batch).logits, batch), expected) <= TOLERANCE
    prompts = LavinCollator(processor, "left", prompt_only=True)(SAMPLES)
    assert generate(merged, prompts).sequences.shape == (3, prompts["input_ids"].shape[1] + 3)


@needs_easy_vqa
def test_easy_vqa(monkeypatch, tmp_path):
    """The task on pictures that are all alike: its parts, and a step of tuning."""
    import examples.lavin.easy_vqa
    from examples.shared.task import tune

    monkeypatch.setattr(examples.lavin.easy_vqa, "load_images", lambda split: None)
    pixels = torch.zeros(1, 3, 64, 64).expand(4000, -1, -1, -1)
    monkeypatch.setattr(examples.lavin.easy_vqa, "preprocess", lambda processor, images: pixels)
    task = examples.lavin.easy_vqa.lavin_easy_vqa()
    assert (len(task.train), len(task.reward), len(task.test)) == (36631, 1944, 2419)
    base, again = task.load_base(), task.load_base()
    assert base.config.num_image_tokens == 4
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))
    model = get_peft_model(base, EASConfig(num_skip=4, **task.eas))
    assert len(model.base_model.candidates) == 8
    callback = EASCallback(reward_dataset=task.reward[:8], search_steps=1, warmup_steps=0, interval=1)
    tune(model, task, tmp_path, callbacks=[callback], max_steps=2, per_device_train_batch_size=4, disable_tqdm=True)
    assert len(model.base_model.skipped_modules) == 4
    batch = task.deployed_batch()
    assert "labels" not in batch
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape
