"""The converter of examples/lavin, against the released systems' formulas in the original files' conventions."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import difference
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.lavin import convert as lavin_convert
from examples.lavin.conversion import convert_adapter, load_clip, load_llama, load_tokenizer, read_adapter
from examples.lavin.modeling_lavin import LavinForConditionalGeneration
from examples.lavin.processing_lavin import LavinProcessor

WIDTH, HEADS, LAYERS, FFN, VOCAB = 16, 2, 3, 24, 30
VISION_WIDTH, VISION_LAYERS, PATCH, IMAGE, PROJECTED = 128, 4, 4, 8, 6
RANK, PIA_RANK, TEMPERATURE, SCALE = 4, 8, 0.5, 1.5
WORDS = ["<unk>", "<s>", "</s>", *"Image: N/A what shape is it".split()]  # noqa: SIM905
TOLERANCE = 1e-5


# --- files as the originals are --------------------------------------------------------------------------------------


def llama_weights() -> dict[str, torch.Tensor]:
    shapes = {"tok_embeddings": (VOCAB, WIDTH), "norm": (WIDTH,), "output": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.attention.{name}": (WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
        shapes |= {f"layers.{i}.feed_forward.{name}": (FFN, WIDTH) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2": (WIDTH, FFN)}
        shapes |= {f"layers.{i}.{name}": (WIDTH,) for name in ("attention_norm", "ffn_norm")}
    return {f"{name}.weight": torch.randn(shape) * 0.4 + (len(shape) == 1) for name, shape in shapes.items()}


def clip_weights() -> dict[str, torch.Tensor]:
    d = VISION_WIDTH
    shapes = {"conv1.weight": (d, 3, PATCH, PATCH), "class_embedding": (d,), "proj": (d, 20)}
    shapes |= {"positional_embedding": ((IMAGE // PATCH) ** 2 + 1, d)}
    shapes |= {f"ln_{name}.{kind}": (d,) for name in ("pre", "post") for kind in ("weight", "bias")}
    for i in range(VISION_LAYERS):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
        shapes |= {f"{block}.attn.out_proj.weight": (d, d), f"{block}.attn.out_proj.bias": (d,)}
        shapes |= {f"{block}.ln_{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}.mlp.c_fc.weight": (2 * d, d), f"{block}.mlp.c_fc.bias": (2 * d,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (d, 2 * d), f"{block}.mlp.c_proj.bias": (d,)}
    weights = {f"visual.{name}": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    text = {"logit_scale": torch.ones(()), "token_embedding.weight": torch.randn(5, 7), "ln_final.bias": torch.ones(7)}
    return weights | text


def adapter_weights(with_pia: bool) -> dict[str, torch.Tensor]:
    def adapter(prefix: str, d: int, r: int, downs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        shapes = {f"{down}.weight": (r, d, 1) for down in downs} | {f"{down}.bias": (r,) for down in downs}
        for up in ("conv_B", "conv_D"):
            shapes |= {f"{up}.weight": (d, r // 2, 1), f"{up}.bias": (d,)}
        shapes |= {"expert_weights.weight": (2, d), "expert_weights.bias": (2,)}
        return {f"{prefix}.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}

    weights = {}
    for i in range(LAYERS):
        weights |= adapter(f"layers.{i}.adapter_attn", WIDTH, RANK, ("conv_A",))
        if with_pia:
            weights |= adapter(f"layers.{i}.replaced_adapter", WIDTH, PIA_RANK, ("conv_A", "conv_C"))
    for i in range(VISION_LAYERS):
        name = f"backbone.visual.transformer.resblocks.{i}.adapter_attn"
        weights |= adapter(name, VISION_WIDTH, RANK, ("conv_A",))
    for name, shape in (("conv_A", (PROJECTED, VISION_WIDTH)), ("conv_B", (WIDTH, PROJECTED))):
        weights[f"adapter_proj.{name}.weight"] = 0.3 * torch.randn(shape)
        weights[f"adapter_proj.{name}.bias"] = 0.3 * torch.randn(shape[0])
    weights["adapter_modality_embedding.weight"] = torch.randn(2, WIDTH)
    return weights


# Along which dimension a weight is cut into shards.
CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


def write_llama(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    params = {"dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-6, "multiple_of": 8, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    for k in range(shards):
        shard = {"rope.freqs": torch.ones(WIDTH // HEADS // 2)}
        for name, weight in weights.items():
            cut = CUT.get(name.split(".")[-2])
            shard[name] = weight if cut is None else weight.chunk(shards, cut)[k].clone()
        torch.save(shard, folder / f"consolidated.{k:02}.pth")
    return folder


def write_adapter(path: Path, weights: dict[str, torch.Tensor], **arguments) -> Path:
    arguments = {"adapter_scale": SCALE, "temperature": TEMPERATURE, "skip_list": "[]", **arguments}
    held = {f"module.{name}": value for name, value in weights.items()}
    torch.save(
        {"model": held, "optimizer": {"state": {}}, "epoch": 19, "scaler": None, "args": Namespace(**arguments)}, path
    )
    return path


# --- the released systems, in their own conventions ------------------------------------------------------------------


def rotate_pairs(x):
    """x (B, T, heads, d), of which dimensions 2 i and 2 i + 1 are one complex number."""
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    d = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def bottleneck(weights, prefix, inner, routed_by):
    """s sum_e g_e (U_e inner + b_e) as grouped convolutions; `inner` is (B, T, r)."""
    logits = F.linear(routed_by, weights[f"{prefix}.expert_weights.weight"], weights[f"{prefix}.expert_weights.bias"])
    gates = torch.softmax(logits / TEMPERATURE, -1)
    inner = inner.transpose(1, 2)
    paths = [
        F.conv1d(inner, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"], groups=2)
        for name in ("conv_B", "conv_D")
    ]
    return SCALE * sum(gates[:, e, None, None] * path for e, path in enumerate(paths)).transpose(1, 2)


def down(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"][..., 0], weights[f"{name}.bias"])


def image_tokens(clip, adapter, pixel_values):
    def get(name):
        return clip[f"visual.{name}"]

    def norm(x, name):
        return F.layer_norm(x, (VISION_WIDTH,), get(f"{name}.weight"), get(f"{name}.bias"))

    x = F.conv2d(pixel_values, get("conv1.weight"), stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([get("class_embedding").expand(len(x), 1, -1), x], 1) + get("positional_embedding")
    x, tokens = norm(x, "ln_pre"), []
    for i in range(VISION_LAYERS):
        block = f"transformer.resblocks.{i}"
        z = norm(x, f"{block}.ln_1")
        if adapter is not None:  # routed by the mean over the image, as no original is
            prefix = f"backbone.visual.{block}.adapter_attn"
            z = z + bottleneck(adapter, prefix, down(adapter, f"{prefix}.conv_A", z), z.mean(1))
        mha = torch.nn.MultiheadAttention(VISION_WIDTH, VISION_WIDTH // 64, batch_first=True)
        mha.load_state_dict({n: get(f"{block}.attn.{n}") for n in mha.state_dict()})
        x = x + mha(z, z, z, need_weights=False)[0]
        h = F.linear(norm(x, f"{block}.ln_2"), get(f"{block}.mlp.c_fc.weight"), get(f"{block}.mlp.c_fc.bias"))
        h = h * torch.sigmoid(1.702 * h)
        x = x + F.linear(h, get(f"{block}.mlp.c_proj.weight"), get(f"{block}.mlp.c_proj.bias"))
        if (i + 1) % 4 == 0:
            tokens.append(x[:, 0])
    return torch.stack(tokens, 1)


def attention(llama, i, z, mask):
    wq, wk, wv, wo = (llama[f"layers.{i}.attention.{n}.weight"] for n in ("wq", "wk", "wv", "wo"))
    q, k, v = (F.linear(z, w).unflatten(-1, (HEADS, -1)) for w in (wq, wk, wv))
    q, k, v = (x.transpose(1, 2) for x in (rotate_pairs(q), rotate_pairs(k), v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), wo)


def ffn(llama, i, z):
    w1, w2, w3 = (llama[f"layers.{i}.feed_forward.{n}.weight"] for n in ("w1", "w2", "w3"))
    return F.linear(F.silu(F.linear(z, w1)) * F.linear(z, w3), w2)


def released(llama, clip, adapter, ids, pixel_values, skipped=(), has_modality=True):
    """Logits; `ids` are the text's behind BOS and prefix, -1 where an image token is wanted.

    The routers read the modality token where nothing is skipped (LaVIN), else the mean over the tokens (LaVIN-EAS, but
    for the modality token, which is left out of the routers' mean there).
    """
    h = llama["tok_embeddings.weight"][ids.clamp_min(0)]
    if has_modality:
        tokens = image_tokens(clip, adapter, pixel_values)
        hidden = F.silu(F.linear(tokens, adapter["adapter_proj.conv_A.weight"], adapter["adapter_proj.conv_A.bias"]))
        tokens = F.linear(hidden, adapter["adapter_proj.conv_B.weight"], adapter["adapter_proj.conv_B.bias"])
        h = h.masked_scatter((ids == -1)[..., None], tokens)
        h = torch.cat([adapter["adapter_modality_embedding.weight"][1].expand(len(h), 1, -1), h], 1)
    length = h.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    if has_modality:
        mask[1:, 0] = float("-inf")
    for i in range(LAYERS):
        z = rms(h, llama[f"layers.{i}.attention_norm.weight"])
        w2 = llama[f"layers.{i}.ffn_norm.weight"]
        if i in skipped:
            prefix = f"layers.{i}.replaced_adapter"
            context = down(adapter, f"{prefix}.conv_A", z).mean(1, keepdim=True)
            inner = 0.5 * (context + down(adapter, f"{prefix}.conv_C", z))
            h = h + ffn(llama, i, w2 * (z + bottleneck(adapter, prefix, inner, z.mean(1))))
            continue
        if adapter is not None:
            prefix = f"layers.{i}.adapter_attn"
            routed_by = z.mean(1) if skipped else z[:, 0]
            z = z + bottleneck(adapter, prefix, down(adapter, f"{prefix}.conv_A", z), routed_by)
        h = h + attention(llama, i, z, mask)
        h = h + ffn(llama, i, rms(h, w2))
    return F.linear(rms(h, llama["norm.weight"]), llama["output.weight"])


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    torch.manual_seed(0)
    llama, clip = llama_weights(), clip_weights()
    folder = write_llama(tmp_path / "llama" / "7B", llama)
    torch.save(clip, tmp_path / "clip.pth")
    return llama, clip, folder, tmp_path / "clip.pth"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def build(folder: Path, clip: Path):
    tokenizer = make_tokenizer()
    return LavinForConditionalGeneration.from_parts(
        load_llama(folder), load_clip(clip), tokenizer, projector_width=PROJECTED
    ), tokenizer


@pytest.mark.parametrize("shards", [1, 2])
def test_llama(shards, parts, tmp_path):
    llama = parts[0]
    folder = write_llama(tmp_path / f"{shards} shards", llama, shards)
    model = load_llama(folder)
    ids = torch.randint(3, VOCAB, (2, 7))
    expected = released(llama, None, None, ids, None, has_modality=False)
    assert difference(model(ids).logits, expected) <= TOLERANCE
    assert load_llama(folder, torch.bfloat16).dtype == torch.bfloat16


def test_clip(parts):
    _, clip, _, path = parts
    pixels = torch.randn(2, 3, IMAGE, IMAGE)
    model = load_clip(path)
    assert model.config.num_attention_heads == 2
    states = model(pixels, output_hidden_states=True).hidden_states
    assert difference(states[4][:, :1], image_tokens(clip, None, pixels)) <= TOLERANCE


@pytest.mark.parametrize("skipped", [(), (0, 2)], ids=["LaVIN", "LaVIN-EAS"])
def test_a_released_adapter(skipped, parts, tmp_path):
    llama, clip, folder, path = parts
    weights = adapter_weights(with_pia=bool(skipped))
    file = write_adapter(tmp_path / "adapter.pth", weights, skip_list=str(list(skipped)))
    model, tokenizer = build(folder, path)
    with pytest.warns(UserWarning, match="keep the two together" if skipped else "routing='modality'"):
        tuned = convert_adapter(model, read_adapter(file, LAYERS, VISION_LAYERS))
    assert tuned.base_model.skipped_modules == [f"model.language_model.layers.{i}.self_attn" for i in skipped]
    pixels = torch.randn(2, 3, IMAGE, IMAGE)
    processor = LavinProcessor(
        tokenizer, CLIPImageProcessorPil(), 1, routing="prompt" if skipped else "modality", separator=""
    )
    batch = processor(["what shape", "it is"], list(pixels))
    ids = batch["input_ids"][:, 1:].clone()
    ids[ids == processor.image_token_id] = -1
    expected = released(llama, clip, weights, ids, pixels, skipped)
    assert difference(tuned(**batch).logits, expected) <= TOLERANCE
    merged = tuned.merge_and_unload(context="prompt")
    assert difference(merged(**batch).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("skip", [None, "0,2"])
def test_command_line(skip, parts, tmp_path, monkeypatch):
    llama, clip, folder, path = parts
    make_tokenizer().save_pretrained(folder.parent)  # above, as in the original files
    weights = adapter_weights(with_pia=skip is not None)
    file = write_adapter(tmp_path / "adapter.pth", weights)
    arguments = ["--llama", str(folder), "--clip", str(path), "--adapter", str(file), "--dtype", "float32"]
    arguments += ["--skip", skip] if skip else []
    monkeypatch.setattr(sys, "argv", ["convert", *arguments, "--output", str(tmp_path / "out")])
    with pytest.warns(UserWarning, match="was converted"):
        lavin_convert.main()
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "base")
    pixels = torch.randn(1, 3, IMAGE, IMAGE)
    batch = processor(["what shape"], list(pixels))
    assert ("eas_prompt_mask" in batch) == (skip is None)
    ids = batch["input_ids"][:, 1:].clone()
    ids[ids == processor.image_token_id] = -1
    expected = released(llama, clip, weights, ids, pixels, (0, 2) if skip else ())
    assert difference(model(**batch).logits, expected) <= TOLERANCE
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("layers.1.attention.wq.weight"),
         r"lacks layers.1.attention.wq.weight\. It must hold 30 weights"),
        (lambda w: w.update({"strange.weight": torch.ones(1)}), r"has unexpected strange.weight\."),
        (lambda w: w.update({"layers.0.attention.wo.weight": torch.ones(3, 4)}),
         r"layers.0.attention.wo.weight of shape \(3, 4\), but.*\(16, 16\).*belong together"),
        (lambda w: w.update({"norm.weight": Code()}), r"cannot be read as weights alone.*save its state_dict"),
    ],
    ids=["missing", "unexpected", "misshaped", "code"],
)  # fmt: skip
def test_a_llama_that_does_not_fit(change, match, parts, tmp_path, capsys):
    weights = dict(parts[0])
    change(weights)
    with pytest.raises(ValueError, match=match):
        load_llama(write_llama(tmp_path / "other", weights))
    assert "must not run" not in capsys.readouterr().out


def test_files_that_do_not_fit(parts, tmp_path):
    llama, clip, _, path = parts
    with pytest.raises(FileNotFoundError, match=r"does not hold params.json and consolidated"):
        load_llama(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing.pth is no file"):
        load_clip(tmp_path / "nothing.pth")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"clip.pth cannot be read as weights alone.*Download it again"):
        load_clip(path)
    torch.save(llama, path)
    with pytest.raises(ValueError, match=r"lacks visual.class_embedding"):
        load_clip(path)
    torch.save({**clip, "visual.positional_embedding": torch.ones(4, VISION_WIDTH)}, path)
    with pytest.raises(ValueError, match=r"positional_embedding of shape \(4, 128\), but.*\(2, 128\)"):
        load_clip(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match=r"TorchScript archive.*torch.jit.load.*state_dict"):
        load_clip(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"holds a list"):
        load_clip(path)


def test_tokenizers_that_do_not_fit(tmp_path):
    folder = tmp_path / "llama" / "7B"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"Neither .*7B nor the folder above holds tokenizer.json"):
        load_tokenizer(folder)
    (folder.parent / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tokenizer.model cannot be read.*pip install sentencepiece protobuf"):
        load_tokenizer(folder)


def test_what_lavin_eas_never_calls_is_left_out(parts, tmp_path):
    """The search's scores, and what its vision blocks hold in front of their FFNs unless they are "router_block"."""
    weights = adapter_weights(True)
    unused = {k.replace("adapter_attn", "adapter_mlp"): v + 1 for k, v in weights.items() if ".resblocks." in k}
    assert unused
    extra = {**weights, **unused, "scores": torch.zeros(LAYERS)}
    file = tmp_path / "adapter.pth"
    given, expected = (
        read_adapter(
            write_adapter(file, held, skip_list="[0, 2]", visual_adapter_type="normal"), LAYERS, VISION_LAYERS
        )
        for held in (extra, weights)
    )
    assert given.skipped == expected.skipped == (0, 2)
    for kind in ("text", "vision", "pia"):
        for i, one in getattr(expected, kind).items():
            assert all(torch.equal(getattr(given, kind)[i][name], value) for name, value in one.items())
    write_adapter(file, extra, skip_list="[0, 2]", visual_adapter_type="router_block")
    with pytest.raises(ValueError, match=r"unexpected .*resblocks.0.adapter_mlp"):
        read_adapter(file, LAYERS, VISION_LAYERS)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ('{"dim": 16', r"params.json does not tell n_layers, n_heads, dim, norm_eps\. It must be a dictionary"),
        ('{"dim": 16, "n_heads": 2, "n_layers": 3}', r"params.json does not tell norm_eps\."),
        ('{"dim": 16, "n_heads": 2, "n_layers": 3, "norm_eps": 1e-5, "use_scaled_rope": true}', "scaled rotary"),
    ],
)
def test_params_that_do_not_fit(params, match, parts, tmp_path):
    folder = write_llama(tmp_path / "other", parts[0])
    (folder / "params.json").write_text(params)
    with pytest.raises(ValueError, match=match):
        load_llama(folder)


@pytest.mark.parametrize(
    ("pia", "change", "options", "match"),
    [
        (False, lambda w: w.pop("adapter_proj.conv_A.bias"), {}, r"lacks adapter_proj.conv_A.bias"),
        (False, lambda w: w.update({"layers.0.adapter_mlp.conv_A.bias": torch.ones(4)}), {},
         r"unexpected layers.0.adapter_mlp"),
        (False, lambda w: w.update({"layers.2.adapter_attn.conv_B.weight": torch.ones(16, 4, 1)}), {},
         r"text layer 2 has up.0.weight of shape \(16, 4\), but.*\(16, 2\)"),
        (False, lambda w: w.update({"adapter_modality_embedding.weight": torch.ones(2, 8)}), {},
         r"modality_embedding.weight of shape \(2, 8\), but.*\(2, 16\)"),
        (False, lambda w: w.update({k: v[:2] for k, v in w.items() if "resblocks" in k and "conv_A" in k}), {},
         r"text adapters have rank 4 and the vision adapters 2"),
        (False, lambda w: None, {"skipped": [1]}, r"skip the layers \[1\], but allowed is none"),
        (True, lambda w: None, {}, r"not which layers are skipped.*--skip"),
        (True, lambda w: None, {"skipped": [0, 3]}, r"skip the layers \[0, 3\], but allowed are layers 0 to 2"),
    ],
    ids=["missing", "in front of FFNs", "misshaped", "width", "ranks", "no PIA", "no skip set", "no such layer"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_changes_nothing(pia, change, options, match, parts, tmp_path):
    _, _, folder, path = parts
    weights = adapter_weights(pia)
    change(weights)
    file = write_adapter(tmp_path / "adapter.pth", weights)
    model, _ = build(folder, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        convert_adapter(model, read_adapter(file, LAYERS, VISION_LAYERS, **options))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_norm_without_weight_is_refused(parts, tmp_path):
    _, _, folder, path = parts
    model, _ = build(folder, path)
    with torch.no_grad():
        model.model.language_model.layers[0].post_attention_layernorm.weight[3] = 0
    file = write_adapter(tmp_path / "adapter.pth", adapter_weights(True), skip_list="[0]")
    with pytest.raises(ValueError, match=r"FFN's norm of layer 0 has a weight of 0"):
        convert_adapter(model, read_adapter(file, LAYERS, VISION_LAYERS))
