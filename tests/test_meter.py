"""METER of examples/meter: the model under EAS, its heads, the converter and the tasks."""

import functools
import itertools
from argparse import Namespace
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import difference, needs_easy_vqa
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    Trainer,
    TrainingArguments,
)

from examples.meter.conversion import convert, infer_config, read_checkpoint, resize_positions
from examples.meter.modeling_meter import (
    CROSS_MODAL_MHAS,
    MeterConfig,
    MeterForImagesAndTextClassification,
    MeterForImageTextRetrieval,
    MeterForPreTraining,
    MeterForVisualQuestionAnswering,
    MeterModel,
)
from peft_eas import EASConfig, attention_similarities

WIDTH, LAYERS, VOCAB, ANSWERS = 16, 2, 30, 5
HEADS = {
    "vqa": MeterForVisualQuestionAnswering,
    "nlvr2": MeterForImagesAndTextClassification,
    "retrieval": MeterForImageTextRetrieval,
}
MHAS = [
    f"meter.cross_modal_{tower}_layers.{layer}.{kind}"
    for tower, layer, kind in itertools.product(("text", "image"), range(LAYERS), ("attention", "crossattention"))
]


def make_config(**changes) -> MeterConfig:
    blocks = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    return MeterConfig(
        vision_config={**blocks, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1},
        text_config={**blocks, **still, "vocab_size": VOCAB, "num_hidden_layers": 1, "max_position_embeddings": 20},
        **{**blocks, **still, "num_cross_layers": LAYERS, **changes},
    )


def make_model(head: str = "vqa", **changes) -> nn.Module:
    torch.manual_seed(0)
    changes = {"num_labels": ANSWERS, **changes} if head == "vqa" else changes
    model = HEADS[head](make_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms that differ, and biases that are not zero
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_inputs(head: str = "vqa", batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with padding in every text but the first."""
    generator = torch.Generator().manual_seed(seed)
    texts = (batch, 2, 6) if head == "retrieval" else (batch, 6)
    images = (batch, 2, 3, 16, 16) if head == "nlvr2" else (batch, 3, 16, 16)
    ids = torch.randint(4, VOCAB, texts, generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, ..., 4:] = 0
    ids[mask == 0] = 1  # RoBERTa's padding
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(images, generator=generator),
    }


def make_eas(head: str, skip: list[str], context: str = "prompt", warm: bool = True, **options):
    """Adapters that are not the identity, whose running contexts have seen a batch."""
    config = EASConfig(
        target_modules=CROSS_MODAL_MHAS,
        **{"skipped_modules": skip, "r": 8, "attention_r": 4, "paths": 1, "dropout": 0.0, "init_weights": False},
        **options,
    )
    model = get_peft_model(make_model(head), config)
    if warm:
        model.train()
        with torch.no_grad():
            model(**make_inputs(head, seed=5))
    if context == "running":
        model.freeze_context()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("head", HEADS)
def test_padding_does_not_count_in_similarities(head: str) -> None:
    """The states are (2 B, T) for NLVR2's two images and (B K, T) for retrieval's texts; also where T is that of the
    image."""

    def similarities(inputs: dict[str, Tensor]) -> Tensor:
        return torch.tensor(list(attention_similarities(make_eas(head, []), [inputs]).values()))

    inputs, num_image_tokens = make_inputs(head), 5
    for length in (num_image_tokens, 12):
        padding = (0, length - 4)
        longer = {
            **inputs,
            "input_ids": F.pad(inputs["input_ids"][..., :4], padding, value=1),
            "attention_mask": F.pad(inputs["attention_mask"][..., :4], padding),
        }
        exact = {**inputs, "input_ids": inputs["input_ids"][..., :4]}
        del exact["attention_mask"]
        torch.testing.assert_close(similarities(longer), similarities(exact))


@pytest.mark.parametrize("head", HEADS)
def test_accumulated_gradients_are_those_of_one_batch(head: str, tmp_path: Path) -> None:
    labels = {
        "vqa": torch.eye(ANSWERS)[:4],
        "nlvr2": torch.tensor([0, 1, 1, 0]),
        "retrieval": torch.tensor([0, 1, 1, 0]),
    }
    inputs = {**make_inputs(head, batch=4), "labels": labels[head]}

    def gradient_norm(batch_size: int, accumulation: int) -> float:
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        data = [{name: value[i] for name, value in inputs.items()} for i in range(4)]
        model = make_eas(head, [], warm=False)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=torch.utils.data.default_collate)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert gradient_norm(1, 4) == pytest.approx(gradient_norm(4, 1), rel=1e-4)


# --- the model under EAS ---------------------------------------------------------------------------------------------


def test_candidates_are_the_24_of_the_co_attention_layers() -> None:
    config = make_config(num_cross_layers=6, num_labels=ANSWERS)
    model = get_peft_model(
        MeterForVisualQuestionAnswering(config), EASConfig(target_modules=CROSS_MODAL_MHAS, num_skip=12, paths=1)
    )
    assert len(model.base_model.candidates) == 24
    assert Counter(name.split(".")[1] + "." + name.split(".")[3] for name in model.base_model.candidates) == {
        "cross_modal_text_layers.attention": 6,
        "cross_modal_text_layers.crossattention": 6,
        "cross_modal_image_layers.attention": 6,
        "cross_modal_image_layers.crossattention": 6,
    }


@pytest.mark.parametrize("name", MHAS)
def test_each_mha_can_be_skipped_alone_and_is_then_not_computed(name: str) -> None:
    model = make_eas("vqa", [name], context="running")
    calls: Counter[str] = Counter()
    for mha, part in itertools.product(MHAS, ("query", "key", "value")):
        for module_name, module in model.named_modules():
            if mha in module_name and module_name.endswith(f"self.{part}"):
                module.register_forward_hook(lambda *_, mha=mha: calls.update([mha]))
    inputs = make_inputs()
    unmerged = logits(model, inputs)
    assert calls == {mha: 3 for mha in MHAS if mha != name}
    merged = model.merge_and_unload()
    assert not any(name in parameter and "LayerNorm" not in parameter for parameter, _ in merged.named_parameters())
    assert difference(logits(merged, inputs), unmerged) < 1e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("context", ["running", "prompt"])
def test_merged_equals_unmerged(head: str, context: str) -> None:
    model, inputs = make_eas(head, MHAS[::2] + MHAS[1:2], context), make_inputs(head)
    unmerged = logits(model, inputs)
    merged = model.merge_and_unload(**({"context": "prompt"} if context == "prompt" else {}))
    assert difference(logits(merged, inputs), unmerged) < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_starts_as_the_base_and_off_means_off(head: str) -> None:
    inputs, expected = make_inputs(head), logits(make_model(head), make_inputs(head))
    model = get_peft_model(
        make_model(head), EASConfig(target_modules=CROSS_MODAL_MHAS, num_skip=4, paths=1, r=8, attention_r=4)
    ).eval()
    assert torch.equal(logits(model, inputs), expected)
    model = make_eas(head, MHAS[:5])
    assert not torch.equal(logits(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)


def test_context_of_a_cross_attention_is_the_other_tower() -> None:
    """With the text's cross-attention skipped, another image still changes the text's features, by the context."""
    inputs = make_inputs()
    other = {**inputs, "pixel_values": make_inputs(seed=1)["pixel_values"]}
    skipped = [name for name in MHAS if "text_layers" in name and name.endswith("crossattention")]

    def text_features(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model.get_base_model().meter(**values).pooler_output[:, :WIDTH]

    model = make_eas("vqa", skipped)
    assert difference(text_features(model, other), text_features(model, inputs)) > 1e-3
    model.freeze_context()
    assert torch.equal(text_features(model, other), text_features(model, inputs))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("skip", [[], MHAS[:3]], ids=["base", "eas"])
def test_batch_equals_one_by_one(skip: list[str], attention: str) -> None:
    model = make_eas("vqa", skip) if skip else make_model()
    (model.get_base_model() if skip else model).set_attn_implementation(attention)
    inputs, batch = make_inputs(), logits(model, make_inputs())
    for row, expected in enumerate(batch):
        length = int(inputs["attention_mask"][row].sum())
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        one = {**one, "input_ids": one["input_ids"][:, :length], "attention_mask": None}
        assert difference(logits(model, one)[0], expected) < 1e-5


def test_layers_read_the_other_tower_before_its_update() -> None:
    """One co-attention layer by hand, in the original's order."""
    model = make_model(num_cross_layers=1).meter
    text, image = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        output = model.fuse(text, None, image)
        for layer, own, other, actual in (
            (model.cross_modal_text_layers[0], text, image, output.text_hidden_states),
            (model.cross_modal_image_layers[0], image, text, output.image_hidden_states),
        ):
            weights = {f"layer.{name}": weight for name, weight in layer.state_dict().items()}
            assert difference(actual, original_cross_layer(weights, "layer", own, other, heads=2)) < 1e-5


def test_nlvr2_reads_the_pair_in_order_with_a_token_type_each() -> None:
    model, inputs = make_model("nlvr2"), make_inputs("nlvr2")
    meter = model.meter
    with torch.no_grad():
        text = meter.encode_text(inputs["input_ids"], inputs["attention_mask"])
        pooled = [
            meter.fuse(
                text,
                inputs["attention_mask"],
                meter.encode_image(inputs["pixel_values"][:, i]) + meter.token_type_embeddings.weight[1 + i],
            ).pooler_output
            for i in (0, 1)
        ]
        assert difference(logits(model, inputs), model.nlvr2_classifier(torch.cat(pooled, -1))) < 1e-5
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(1)}
    assert difference(logits(model, swapped), logits(model, inputs)) > 1e-3


def test_retrieval_scores_every_pair_as_if_alone() -> None:
    model, inputs = make_model("retrieval"), make_inputs("retrieval")
    scores = logits(model, inputs)
    assert scores.shape == (3, 2)
    for row, column in itertools.product(range(3), range(2)):
        one = {name: inputs[name][row : row + 1, column : column + 1] for name in ("input_ids", "attention_mask")}
        score = logits(model, {**one, "pixel_values": inputs["pixel_values"][row : row + 1]})
        assert torch.allclose(score, scores[row, column], rtol=1e-5, atol=1e-5)


def test_ranking_head_starts_as_the_matching_head(tmp_path: Path) -> None:
    model = MeterForPreTraining(make_config())
    model.save_pretrained(tmp_path / "pretrained")
    model = MeterForImageTextRetrieval.from_pretrained(tmp_path / "pretrained")
    assert torch.equal(model.rank_output.weight, model.itm_score.fc.weight[1:])
    assert torch.equal(model.rank_output.bias, model.itm_score.fc.bias[1:])
    with torch.no_grad():
        model.rank_output.weight.fill_(3.0)
    model.save_pretrained(tmp_path / "tuned")
    model = MeterForImageTextRetrieval.from_pretrained(tmp_path / "tuned")
    assert (model.rank_output.weight == 3.0).all()


def test_losses() -> None:
    inputs = make_inputs()
    labels = torch.tensor([[1.0, 0.3, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 0.9]])
    output = make_model()(**inputs, labels=labels)
    expected = -(labels * F.logsigmoid(output.logits) + (1 - labels) * F.logsigmoid(-output.logits)).sum() / 3
    assert torch.allclose(output.loss, expected)
    for head in ("nlvr2", "retrieval"):
        labels = torch.tensor([1, 0, 1])
        output = make_model(head)(**make_inputs(head), labels=labels)
        assert torch.allclose(output.loss, -output.logits.log_softmax(-1)[range(3), labels].mean())


@pytest.mark.parametrize("head", HEADS)
def test_heads_learn_with_the_base_frozen(head: str) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(head, batch=4)
    labels = F.one_hot(torch.tensor([0, 1, 2, 3]), ANSWERS) if head == "vqa" else torch.tensor([0, 1, 1, 0])
    classifier = {"vqa": "vqa_classifier", "nlvr2": "nlvr2_classifier", "retrieval": "rank_output"}[head]
    model = get_peft_model(
        make_model(head),
        EASConfig(
            target_modules=CROSS_MODAL_MHAS,
            **{"skipped_modules": MHAS[:4], "r": 8, "attention_r": 4, "paths": 1, "dropout": 0.0},
            modules_to_save=[classifier, "cross_modal_text_pooler", "meter.token_type_embeddings"],
        ),
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    token_types = model.get_base_model().meter.token_type_embeddings
    assert not torch.equal(token_types.modules_to_save["default"].weight, token_types.original_module.weight)


def test_auto_classes_and_round_trip(tmp_path: Path) -> None:
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MeterConfig)
    reloaded = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert isinstance(reloaded, MeterForVisualQuestionAnswering)
    assert torch.equal(logits(reloaded, inputs), logits(model, inputs))
    assert isinstance(AutoModel.from_pretrained(tmp_path), MeterModel)


AUTO_CLASSES = {
    "vqa": AutoModelForVisualQuestionAnswering,
    "nlvr2": AutoModelForSequenceClassification,
    "retrieval": AutoModelForMultipleChoice,
}


@pytest.mark.parametrize("head", HEADS)
def test_merged_model_is_saved_and_reloaded(head: str, tmp_path: Path) -> None:
    model, inputs = make_eas(head, MHAS[:5], "running"), make_inputs(head)
    unmerged = logits(model, inputs)
    model.merge_and_unload().save_pretrained(tmp_path)
    reloaded = AUTO_CLASSES[head].from_pretrained(tmp_path)
    assert type(reloaded).__name__ == f"EAS{HEADS[head].__name__}"
    assert difference(logits(reloaded, inputs), unmerged) < 1e-5
    assert sum(p.numel() for p in reloaded.parameters()) < sum(p.numel() for p in make_model(head).parameters())
    with pytest.raises(Exception, match="EAS checkpoint"):
        HEADS[head].from_pretrained(tmp_path)


def test_bad_inputs() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="2 texts and 2 images were received for each sample"):
        make_model()(make_inputs("retrieval")["input_ids"], None, make_inputs("nlvr2")["pixel_values"])
    with pytest.raises(ValueError, match="1 texts and 2 images"):
        make_model(type_vocab_size=2)(inputs["input_ids"], None, make_inputs("nlvr2")["pixel_values"])
    with pytest.raises(ValueError, match="type_vocab_size=2"):
        make_model("nlvr2", type_vocab_size=2)
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\)\. Give pairs of images, \(batch, 2, 3, height, width\)"):
        make_model("nlvr2")(torch.ones(4, 3, dtype=torch.long), None, torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="no pixel_values were received with 2 texts"):
        make_model()(inputs["input_ids"][:2], None, None)
    with pytest.raises(ValueError, match="images of 3 samples were received with 2 texts"):
        make_model()(inputs["input_ids"][:2], None, torch.zeros(3, 3, 8, 8))


# --- the converter ---------------------------------------------------------------------------------------------------


def original_shapes(
    *,
    width: int,
    vision_layers: int,
    text_layers: int,
    cross_layers: int,
    vocab: int,
    tokens: int,
    patch: int,
    grid: int,
) -> dict[str, tuple[int, ...]]:
    """The released checkpoint's names and shapes, of its pretraining, with CLIP and RoBERTa."""

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{name}.{part}", width, width)
        return shapes | norm(f"{name}.output.LayerNorm")

    def ffn(name: str) -> dict[str, tuple[int, ...]]:
        shapes = linear(f"{name}.intermediate.dense", 4 * width, width)
        return shapes | linear(f"{name}.output.dense", width, 4 * width) | norm(f"{name}.output.LayerNorm")

    visual, text = "vit_model.visual", "text_transformer"
    shapes = {
        "vit_model.positional_embedding": (77, width),
        "vit_model.token_embedding.weight": (49, width),
        f"{visual}.class_embedding": (width,),
        f"{visual}.positional_embedding": (grid**2 + 1, width),
        f"{visual}.conv1.weight": (width, 3, patch, patch),
        f"{text}.embeddings.position_ids": (1, tokens),
        f"{text}.embeddings.word_embeddings.weight": (vocab, width),
        f"{text}.embeddings.position_embeddings.weight": (tokens, width),
        f"{text}.embeddings.token_type_embeddings.weight": (1, width),
        "token_type_embeddings.weight": (2, width),
        "mlm_score.decoder.weight": (vocab, width),
        "mlm_score.bias": (vocab,),
    }
    for name in ("vit_model.ln_final", f"{visual}.ln_pre", f"{visual}.ln_post", f"{text}.embeddings.LayerNorm"):
        shapes |= norm(name)
    for name in ("text_transform", "image_transform", "text_pooler.dense", "image_pooler.dense"):
        shapes |= linear(f"cross_modal_{name}", width, width)
    shapes |= linear(f"{text}.pooler.dense", width, width) | linear("itm_score.fc", 2, 2 * width)
    shapes |= linear("mlm_score.transform.dense", width, width) | norm("mlm_score.transform.LayerNorm")
    for layer in range(vision_layers):
        block = f"{visual}.transformer.resblocks.{layer}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}.attn.out_proj", width, width) | norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    for layer in range(text_layers):
        block = f"{text}.encoder.layer.{layer}"
        shapes |= attention(f"{block}.attention") | ffn(block)
    for tower, layer in itertools.product(("text", "image"), range(cross_layers)):
        block = f"cross_modal_{tower}_layers.{layer}"
        shapes |= attention(f"{block}.attention") | attention(f"{block}.crossattention") | ffn(block)
    return shapes


SMALL = {"width": 32, "vision_layers": 2, "text_layers": 1, "cross_layers": 1, "vocab": 30, "tokens": 20, "patch": 4}


convert_small = functools.partial(convert, head_size=16)


def make_state(grid: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.arange(20)[None]
        if name.endswith("position_ids")
        else 0.2 * torch.randn(shape, generator=generator)
        for name, shape in original_shapes(**SMALL, grid=grid).items()
    }


def attend(weights: dict[str, Tensor], name: str, own: Tensor, other: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention, by hand."""

    def project(part: str, states: Tensor) -> Tensor:
        result = states @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]
        return result.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = project("query", own), project("key", other), project("value", other)
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (scores @ value).transpose(1, 2).flatten(2)


def original_cross_layer(weights: dict[str, Tensor], name: str, own: Tensor, other: Tensor, heads: int) -> Tensor:
    """The original's co-attention layer: each of the three parts adds to its input and is normed behind that."""

    def add(part: str, states: Tensor, residual: Tensor) -> Tensor:
        states = states @ weights[f"{name}.{part}.dense.weight"].T + weights[f"{name}.{part}.dense.bias"]
        norm = weights[f"{name}.{part}.LayerNorm.weight"], weights[f"{name}.{part}.LayerNorm.bias"]
        return F.layer_norm(states + residual, own.shape[-1:], *norm, eps=1e-12)

    x = add("attention.output", attend(weights, f"{name}.attention.self", own, own, heads), own)
    x = add("crossattention.output", attend(weights, f"{name}.crossattention.self", x, other, heads), x)
    dense = f"{name}.intermediate.dense"
    return add("output", F.gelu(x @ weights[f"{dense}.weight"].T + weights[f"{dense}.bias"]), x)


def original_vision(weights: dict[str, Tensor], pixel_values: Tensor, heads: int) -> Tensor:
    """The original's vision tower: packed projections, x σ(1.702 x), and the last norm on all tokens."""
    visual = "vit_model.visual"

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = F.conv2d(pixel_values, weights[f"{visual}.conv1.weight"], stride=SMALL["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{visual}.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(f"{visual}.ln_pre", x + weights[f"{visual}.positional_embedding"])
    for layer in range(SMALL["vision_layers"]):
        block = f"{visual}.transformer.resblocks.{layer}"
        packed = {
            f"{part}.{kind}": weight
            for kind in ("weight", "bias")
            for part, weight in zip(
                ("a.query", "a.key", "a.value"), weights[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True
            )
        }
        z = norm(f"{block}.ln_1", x)
        x = x + linear(f"{block}.attn.out_proj", attend(packed, "a", z, z, heads))
        z = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", z * torch.sigmoid(1.702 * z))
    return norm(f"{visual}.ln_post", x)


@pytest.mark.parametrize("head_size", [16, 8])
def test_converted_checkpoint_computes_what_the_original_does(tmp_path: Path, head_size: int) -> None:
    state, heads = make_state(), SMALL["width"] // head_size
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "meter.ckpt")
    model = convert(read_checkpoint(tmp_path / "meter.ckpt"), head_size=head_size)
    assert isinstance(model, MeterForPreTraining)
    pixel_values, ids = torch.randn(2, 3, 12, 12), torch.randint(4, 30, (2, 7))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    with torch.no_grad():
        output = model.meter(ids, None, pixel_values)
        image = linear("cross_modal_image_transform", original_vision(state, pixel_values, heads))
        image = image + state["token_type_embeddings.weight"][1]
        text = model.meter.text_model(ids).last_hidden_state  # transformers' own names
        text = linear("cross_modal_text_transform", text) + state["token_type_embeddings.weight"][0]
        image, text = (
            original_cross_layer(state, "cross_modal_image_layers.0", image, text, heads),
            original_cross_layer(state, "cross_modal_text_layers.0", text, image, heads),
        )
        pooled = torch.cat(
            [
                torch.tanh(linear("cross_modal_text_pooler.dense", text[:, 0])),
                torch.tanh(linear("cross_modal_image_pooler.dense", image[:, 0])),
            ],
            -1,
        )
        assert difference(output.image_hidden_states, image) < 1e-5
        assert difference(output.text_hidden_states, text) < 1e-5
        assert difference(output.pooler_output, pooled) < 1e-5
        assert difference(model(ids, None, pixel_values).itm_logits, linear("itm_score.fc", pooled)) < 1e-5
        hidden = F.gelu(linear("mlm_score.transform.dense", text))
        norm = state["mlm_score.transform.LayerNorm.weight"], state["mlm_score.transform.LayerNorm.bias"]
        words = F.layer_norm(hidden, hidden.shape[-1:], *norm, eps=1e-12) @ state["mlm_score.decoder.weight"].T
        assert difference(model(ids, None, pixel_values).mlm_logits, words + state["mlm_score.bias"]) < 1e-5


@pytest.mark.parametrize("resolution", [288, 384])
def test_real_shapes_have_the_original_parameters(resolution: int) -> None:
    shapes = original_shapes(
        width=768,
        vision_layers=11,
        text_layers=12,
        cross_layers=6,
        vocab=50265,
        tokens=514,
        patch=16,
        grid=resolution // 16,
    )
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = infer_config(state)
    assert (config.num_attention_heads, config.vision_config.image_size) == (12, resolution)
    default = MeterConfig(type_vocab_size=2)
    default.vision_config.image_size = resolution
    assert config.to_dict() == default.to_dict()
    with torch.device("meta"):
        model = convert(state)
    unused = ("vit_model.positional", "vit_model.token", "vit_model.ln", "text_transformer.pooler", "position_ids")
    used = [tensor.numel() for name, tensor in state.items() if not any(part in name for part in unused)]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(used)


def test_converts_each_kind_of_checkpoint() -> None:
    body = {
        name: weight for name, weight in make_state().items() if name.split(".")[0] not in ("itm_score", "mlm_score")
    }
    width = SMALL["width"]

    def classifier(name: str, inputs: int, classes: int) -> dict[str, Tensor]:
        shapes = {"0": (2 * width, inputs), "1": (2 * width,), "3": (classes, 2 * width)}
        weights = {f"{name}.{layer}.weight": torch.ones(shape) for layer, shape in shapes.items()}
        return weights | {f"{name}.{layer}.bias": torch.zeros(shape[0]) for layer, shape in shapes.items()}

    itm = {name: weight for name, weight in make_state().items() if name.startswith("itm_score")}
    rank = {"rank_output.weight": torch.ones(1, 2 * width), "rank_output.bias": torch.zeros(1)}
    assert type(convert_small(body)) is MeterModel
    model = convert_small(body | classifier("vqa_classifier", 2 * width, 7))
    assert type(model) is MeterForVisualQuestionAnswering
    assert model.config.num_labels == 7
    three = {**body, "token_type_embeddings.weight": torch.randn(3, width)}
    assert (
        type(convert_small(three | classifier("nlvr2_classifier", 4 * width, 2)))
        is MeterForImagesAndTextClassification
    )
    assert type(convert_small(body | itm | rank)) is MeterForImageTextRetrieval
    types = convert_small(body, pairs=True).token_type_embeddings.weight
    assert torch.equal(types, body["token_type_embeddings.weight"][[0, 1, 1]])
    assert convert_small(body, image_size=20).config.vision_config.image_size == 20


def test_positions_are_resized_about_the_first() -> None:
    positions = torch.cat([torch.full((1, 2), 9.0), torch.full((9, 2), 4.0)])
    resized = resize_positions(positions, 5)
    assert resized.shape == (26, 2)
    assert torch.equal(resized[0], positions[0])
    assert torch.allclose(resized[1:], torch.tensor(4.0))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = make_state()
    name = "cross_modal_image_layers.0.crossattention.self.key.weight"
    with pytest.raises(ValueError, match=r"missing \(1\): meter.cross_modal_image_layers.0.crossattention.self.key"):
        convert_small({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=r"unexpected \(1\): meter.avgpool.weight"):
        convert_small({**state, "avgpool.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"of another shape \(1\): .*key.weight \(2, 2\) for \(32, 32\)"):
        convert_small({**state, name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"has no vit_model\.visual\.conv1\.weight"):
        convert_small({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="it is a BERT"):
        convert_small({**state, "text_transformer.embeddings.token_type_embeddings.weight": torch.ones(2, 32)})
    with pytest.raises(ValueError, match=r"widths 32, 32 and 32 .* are not multiples of head_size=64"):
        convert(state)
    with pytest.raises(ValueError, match="image_size=13: give a multiple"):
        convert_small(state, image_size=13)

    torch.save({"state_dict": state, "hyper_parameters": Namespace(a=1)}, tmp_path / "arguments.ckpt")
    assert read_checkpoint(tmp_path / "arguments.ckpt").keys() == state.keys()
    torch.save({"state_dict": state, "hyper_parameters": Fraction(1)}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        read_checkpoint(tmp_path / "code.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"holds a list\. Allowed is a dictionary of tensors"):
        read_checkpoint(tmp_path / "list.ckpt")
    torch.save({"epoch": 1}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="holds no weights by name"):
        read_checkpoint(tmp_path / "none.ckpt")


# --- the tasks -------------------------------------------------------------------------------------------------------


def test_recall() -> None:
    from examples.meter.tasks import recall

    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.4, 0.6, 0.5]])
    fits = torch.tensor([[True, False, False], [True, False, False], [True, False, True]])
    assert recall(scores, fits, 1) == pytest.approx(1 / 3)
    assert recall(scores, fits, 2) == pytest.approx(1.0)
    assert recall(scores, fits, 9) == 1.0
    assert recall(scores.T, fits.T, 1) == pytest.approx(1 / 3)  # the second text fits no image


def test_truth_of_statements() -> None:
    from examples.meter.wordings import STATEMENTS

    # Whether the left and the right image show the thing, and the statements that are then true.
    expected = {
        (True, True): {"both images", "at least one image", "left", "right"},
        (True, False): {"at least one image", "left"},
        (False, True): {"at least one image", "right"},
        (False, False): {"neither image"},
    }
    for case, true in expected.items():
        assert {text for text, is_true in STATEMENTS.items() if is_true(*case)} == {
            f"the {where} image shows a {{}}" if where in ("left", "right") else f"a {{}} in {where}" for where in true
        }


@needs_easy_vqa
def test_what_images_show() -> None:
    from examples.easy_vqa.data import load_questions
    from examples.meter.tasks import load_shown

    shown = {part: load_shown(part) for part in ("train", "reward", "test")}
    assert {part: len(found) for part, found in shown.items()} == {"train": 2967, "reward": 165, "test": 772}
    # The first question of the test split is "what is the red shape?" about its first image; the answer, a triangle.
    assert (shown["test"][0].image, shown["test"][0].color, shown["test"][0].shape) == (0, "red", "triangle")
    # Every answer to a "what" question agrees.
    by_image = {one.image: one for one in shown["test"]}
    questions = [question for question in load_questions("what", "test") if question.image in by_image]
    assert all(by_image[question.image].has(question.answer) for question in questions)


@needs_easy_vqa
def test_parts_have_no_image_in_common() -> None:
    from examples.meter.tasks import nlvr2_data, retrieval_data, vqa_data

    images = {
        part: {
            image
            for data in (vqa_data, nlvr2_data, retrieval_data)
            for item in data(part).items
            for image in item.images
        }
        for part in ("train", "reward")
    }
    assert not images["train"] & images["reward"]
    for data in (vqa_data, nlvr2_data, retrieval_data):
        assert [data(part).split for part in ("train", "reward", "test")] == ["train", "train", "test"]


@needs_easy_vqa
def test_nlvr2_is_balanced_and_true() -> None:
    from examples.meter.tasks import load_shown, nlvr2_data

    items = nlvr2_data("test").items
    counts = Counter((item.texts, item.label) for item in items)
    assert set(counts.values()) == {60}
    assert len(counts) == 5 * 3 * 2
    shown = {one.image: one for one in load_shown("test")}
    for item in items:
        (text,), (left, right) = item.texts, item.images
        word = next(word for word in text.split() if any(one.has(word) for one in shown.values()))
        has = [shown[left].has(word), shown[right].has(word)]
        if "at least one" in text:
            assert item.label == (sum(has) > 0)
        elif "both" in text:
            assert item.label == (sum(has) == 2)
        elif "left" in text:
            assert item.label == has[0]
        assert left != right


@needs_easy_vqa
def test_descriptions_and_galleries() -> None:
    from examples.meter.tasks import galleries, load_shown, retrieval_data

    shown = {one.image: one for one in load_shown("train")}
    for item in retrieval_data("train").items[:500]:
        fitting = [
            number
            for number, text in enumerate(item.texts)
            if all(shown[item.images[0]].has(word) for word in text.split() if word in WORDS)
        ]
        assert fitting == [item.label]
    assert len({image for gallery in galleries() for image in gallery.images}) == 3 * 96
    for gallery in galleries():
        assert len(set(gallery.texts)) == 24
        assert gallery.fits.sum(0).tolist() == [4] * 24
        assert gallery.fits.sum(1).tolist() == [1] * 96


@needs_easy_vqa
def test_tasks_on_the_base() -> None:
    """The shipped base takes every task's batches, whose answers stand where the model reads them."""
    from examples.meter.tasks import TASKS

    for name, make_task in TASKS.items():
        task = make_task()
        model = task.load_base()
        batch = task.collate([task.test[index] for index in range(4)])
        assert torch.isfinite(model(**batch).loss)
        assert "labels" not in task.deployed_batch()
        assert not (batch["input_ids"] == 3).any()  # every word is known
        again = task.load_base()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), name


@needs_easy_vqa
def test_base_never_sees_what_the_tasks_ask() -> None:
    from examples.easy_vqa.data import load_questions
    from examples.meter import pretrain as pretrain_meter

    claims = pretrain_meter.build_claims(load_questions("yes/no", "train"))
    for (word, present), texts in claims.items():
        for text in texts:
            assert [name for name in text.replace("?", " ").split() if name in WORDS] == [word]
            negations = [token for token in text.split() if token in ("no", "not")]
            assert present == (len(negations) % 2 == 0)
            assert not {"what", "both", "left", "right", "exactly", "neither"} & set(text.split())


WORDS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "circle", "rectangle", "triangle")
