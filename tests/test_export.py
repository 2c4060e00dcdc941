"""Exported models hold exactly the merged model's weights, compute the same in the engines, or are refused.

The engines run where their interpreters are named: PEFT_EAS_VLLM_PYTHON, PEFT_EAS_MLX_PYTHON,
PEFT_EAS_LLAMA_CPP_PYTHON.
"""

import copy
import importlib.util
import json
import os
import pickle

import merged_smollm2
import numpy as np
import pytest
import torch
import transformers
from conftest import add_eas, build_model, make_eas, mha_names
from engines import interpreter, run_worker, seen, vllm_jobs
from peft import LoraConfig, get_peft_model
from processes import run_alone
from safetensors.torch import load_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from peft_eas import EASConfig
from peft_eas.export import to_decilm, to_gguf, to_vllm

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install gguf")

ROWS = 400  # of the embedding; the tokenizers have fewer tokens
SKIP = [1, 2]
FULL = {"layer_types": ["full_attention"] * 4, "sliding_window": None}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
# Models that all engines can express: family, layers skipped, changes of the config, options of the adapters.
FITTING = {
    "llama": ("llama", SKIP, {}, {}),
    "no biases in attentions": ("llama", SKIP, {}, {"attention_r": 0}),
    "nothing skipped": ("llama", [], {}, {}),
    "all biases": ("llama", SKIP, {"attention_bias": True, "mlp_bias": True}, {}),
    "last layer": ("llama", [3], {}, {}),
    "all but the first": ("llama", [1, 2, 3], {}, {}),
    "tied": ("llama", SKIP, {"tie_word_embeddings": True}, {}),
    "wide heads": ("llama", SKIP, {"head_dim": 16}, {}),
    "linear": ("llama", SKIP, {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}, {}),
    "llama3": ("llama", SKIP, {"rope_parameters": LLAMA3}, {}),
    "mistral": ("mistral", SKIP, {"sliding_window": None}, {}),
    "qwen2": ("qwen2", SKIP, FULL, {}),
    "qwen2 with a window where skipped": (
        *("qwen2", SKIP),
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {},
    ),
}
# Models that vLLM's class cannot.
WITHOUT_FIRST = {"first layer": ("llama", [0, 2], {}, {}), "all but the last": ("qwen2", [0, 1, 2], FULL, {})}
ALL = FITTING | WITHOUT_FIRST
# Widths at which the tokens of random models vary, and which MLX-LM takes.
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": 512}
WIDE |= {"initializer_range": 0.1}


def build(name="llama", merge=True, **more):
    """The merged model of a row of ALL."""
    family, skip, changes, options = ALL[name]
    model = build_model(family, vocab_size=ROWS, **{**changes, **more})
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, max_length=50)
    model = add_eas(model, family, skip, "running", **options)
    return model.merge_and_unload() if merge else model


def weights_of(model):
    """What an export must hold, by the names in transformers."""
    return {name: value for name, value in model.state_dict().items() if value.numel()}


# --- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world, it's 12345 o'clock; they'LL say: \"we've seen 3.14\".",
    "  two  spaces   three\tand\ttabs \n\n new lines\r\n  end  ",
    "naïve café, Ελληνικά, 中文字符 and 🙂🚀 emoji—dashes… x²",
    "<|begin|>user\nHi there<|end|>\n<|begin|>assistant\n",
    *("", " ", "a", " leading", "trailing ", "def f(x):\n    return x**2  # comment", "3 33 333 3333 ½"),
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|begin|>", "<|end|>", "<unk>"]


def byte_level(kind="gpt-2", ignore_merges=False, normalizer=None):
    """A byte-level BPE tokenizer of 380 tokens; `kind` says what comes before BPE."""
    plain, split = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = {
        "gpt-2": [plain],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), plain],
        "qwen2": [split(Regex(WORDS % ""), "isolated"), no_regex],
        "llama-bpe": [split(Regex(WORDS % "{1,3}"), "isolated"), no_regex],
        "unknown": [split(Regex(r"\w+|\W+"), "isolated"), no_regex],
        "prefix": [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    data["normalizer"] = normalizer
    return data


LONGER = {2: 70, 3: 130, 4: 180}  # characters in all tokens of up to so many


def byte_fallback(prepend=True):
    """A tokenizer as of Llama 2, with the merges of all pairs whose join is a token, best token first.

    With `prepend` None, spaces are replaced by the pre-tokenizer Metaspace instead of the normalizer.
    """
    spaced = [text.replace(" ", "▁") for text in TEXTS]
    pieces = [c for c in sorted(set("".join(spaced))) if c.isascii() or c in "▁éï中文"]
    found = {}
    for text in spaced:
        for size in (2, 3, 4):
            for i in range(len(text) - size + 1):
                found[text[i : i + size]] = found.get(text[i : i + size], 0) + 1
    reachable = set(pieces)
    for piece in sorted(found, key=lambda piece: (len(piece), -found[piece])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        if sum(map(len, reachable - set(pieces))) < LONGER[len(piece)] and any(
            a in reachable and b in reachable for a, b in splits
        ):
            reachable.add(piece)
    longer = sorted(reachable - set(pieces), key=lambda piece: (-found[piece], piece))
    names = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256)), *longer, *pieces]
    vocab = {name: i for i, name in enumerate(names[:ROWS])}
    merges = [
        (piece[:i], piece[i:])
        for piece in longer
        for i in range(1, len(piece))
        if piece in vocab and piece[:i] in vocab and piece[i:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    else:
        steps = [normalizers.Prepend("▁")] * prepend + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return json.loads(tokenizer.to_str())


def wrap(data, **options):
    """A transformers tokenizer with a chat template."""
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": None, **options}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **special)
    wrapped.chat_template = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
    return wrapped


TOKENIZERS = {
    "gpt-2": lambda: byte_level("gpt-2"),
    "smollm": lambda: byte_level("smollm"),
    "qwen2": lambda: byte_level("qwen2"),
    "llama-bpe": lambda: byte_level("llama-bpe", ignore_merges=True),
    "dbrx": lambda: byte_level("llama-bpe"),
    "space in front": lambda: byte_fallback(prepend=True),
    "no space in front": lambda: byte_fallback(prepend=False),
    "metaspace, not in front": lambda: byte_fallback(prepend=None),
}


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer as of GPT-2."""
    return wrap(byte_level())


# --- DeciLM's layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTING)
def test_decilm_layout(name, tmp_path):
    model = build(name)
    assert to_decilm(model, tmp_path / "out") == tmp_path / "out"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = weights_of(model)
    tied = model.config.tie_word_embeddings
    if tied:
        expected.pop("lm_head.weight")
    for key, value in expected.items():
        assert torch.equal(exported[key], value)
    zeros = exported.keys() - expected.keys()
    assert all(key.endswith(".bias") and not exported[key].any() for key in zeros)
    assert not [key for key in exported if key.startswith(tuple(f"model.layers.{i}.self_attn" for i in SKIP))] or (
        FITTING[name][1] != SKIP
    )
    # Every projection has a bias if and only if the switch for its kind says so.
    assert config["architectures"] == ["DeciLMForCausalLM"]
    for i, block in enumerate(config["block_configs"]):
        skipped = i in FITTING[name][1]
        assert block["attention"] == {"no_op": skipped, "n_heads_in_group": None if skipped else 2}
        assert block["ffn"] == {"no_op": False, "intermediate_size": 48}
        kinds = {"mlp_bias": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]}
        if not skipped:
            kinds["attention_bias"] = [f"self_attn.{letter}_proj" for letter in "qkvo"]
        for switch, projections in kinds.items():
            for projection in projections:
                assert (f"model.layers.{i}.{projection}.bias" in exported) == config[switch]
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in exported)
    assert config["head_dim"] == (16 if name == "wide heads" else 8)
    assert config["rope_parameters"] == model.config.rope_parameters
    assert config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (model.config.bos_token_id, model.config.eos_token_id)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.max_length) == (0, 1, 50)


def test_decilm_biases_by_family(tmp_path):
    switches = {}
    for name in ("llama", "no biases in attentions", "nothing skipped", "all biases", "qwen2"):
        config = json.loads((to_decilm(build(name), tmp_path / name) / "config.json").read_text())
        switches[name] = [config["attention_bias"], config["mlp_bias"]]
    assert switches == {
        "llama": [True, True],
        "no biases in attentions": [False, True],
        "nothing skipped": [True, False],
        "all biases": [True, True],
        "qwen2": [True, True],
    }


def test_decilm_config_is_read_by_the_file_beside_it(tmp_path):
    to_decilm(build("llama3"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.model_type, config.head_dim, config.num_key_value_heads) == ("nemotron-nas", 8, 2)
    assert [block.attention.no_op for block in config.block_configs] == [False, True, True, False]
    assert config.block_configs[0].attention.n_heads_in_group == 2
    assert config.rope_parameters == LLAMA3
    assert copy.deepcopy(config).to_dict()["block_configs"] == config.block_configs
    assert json.loads(config.to_json_string())["block_configs"][1]["attention"]["no_op"] is True


@pytest.mark.parametrize("width", [48, 256, 1280])
def test_the_width_of_ffns_in_the_words_of_each_engine(width, tmp_path):
    to_decilm(build(intermediate_size=width), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"][1]["ffn"]
    if width == 48:
        assert written == {"no_op": False, "intermediate_size": 48}
    else:  # as all who know ffn_mult compute it
        assert written.keys() == {"no_op", "ffn_mult"}
        assert int(2 * written["ffn_mult"] * 32 / 3) == width
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for read in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        ffn = read.block_configs[1].ffn
        assert (ffn.no_op, ffn.intermediate_size) == (False, width)
        assert not hasattr(ffn, "ffn_mult")  # vLLM asks
        with pytest.raises(AttributeError, match=r"no biases in FFNs.*Serve the merged checkpoint"):
            _ = ffn.ffn_mult  # SGLang and TensorRT-LLM ask for nothing else, and pass over biases


def test_decilm_without_the_first_attention(tmp_path):
    model = build("first layer", **WIDE)
    with pytest.warns(UserWarning, match=r"vLLM's DeciLM class cannot run.*MLX-LM can.* --model-impl transformers"):
        to_decilm(model, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [block["attention"]["no_op"] for block in config.to_dict()["block_configs"]] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"first layer's attention is deleted.* --model-impl transformers"):
        _ = config.block_configs[0].attention.no_op  # vLLM asks
    for sizes in ({"intermediate_size": 500}, {"head_dim": 32}):
        with pytest.raises(ValueError, match=r"first layer's attention.*MLX-LM could, but takes only"):
            to_decilm(build("first layer", **WIDE | sizes), tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_name():
    assert to_vllm is to_decilm


def test_decilm_folder_does_not_load_into_a_stock_class(tmp_path):
    to_decilm(build(), tmp_path / "out")
    for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel):
        with pytest.raises(Exception, match="EAS model in DeciLM's layout"):
            cls.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match=r"nemotron-nas|DeciLMConfig"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_decilm_from_a_folder(tokenizer, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    to_decilm(model, tmp_path / "a", tokenizer)
    to_decilm(str(tmp_path / "merged"), tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    for file in set(files) - {"generation_config.json"}:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    again = AutoTokenizer.from_pretrained(tmp_path / "b", trust_remote_code=True)
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert again.chat_template == tokenizer.chat_template


def test_decilm_without_a_tokenizer(tmp_path):
    names = {path.name for path in to_decilm(build(), tmp_path / "out").iterdir()}
    assert names == {"config.json", "configuration_decilm.py", "generation_config.json", "model.safetensors"}


def test_decilm_in_bfloat16_and_in_shards(tmp_path):
    model = build().bfloat16()
    to_decilm(model, tmp_path / "out", max_shard_size="30KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for key, value in weights_of(model).items():
        shard = load_file(tmp_path / "out" / index[key])
        assert shard[key].dtype == torch.bfloat16
        assert torch.equal(shard[key], value)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_head_that_is_no_longer_the_embedding_is_kept(tmp_path):
    model = build("tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
    to_decilm(model, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], model.lm_head.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_decilm_goes_into_an_empty_folder_only(tmp_path):
    (tmp_path / "out").mkdir()
    to_decilm(build(), tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir()), (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"needs a folder that is empty.*Name another"):
        to_decilm(build("tied"), tmp_path / "out")
    after = sorted(path.name for path in tmp_path.iterdir()), (tmp_path / "out" / "config.json").read_bytes()
    assert before == after
    assert before[0] == ["out"]  # nothing temporary is left


# --- GGUF ------------------------------------------------------------------------------------------------------------


def read_gguf(path):
    """(metadata, {name: float32 array}, {name: type}) of a file."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return metadata, values, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def rows_of(name, value, head_dim):
    """A weight with the rows of query and key projections where llama.cpp looks for them, one by one."""
    value = value.float().numpy()
    if "q_proj" not in name and "k_proj" not in name:
        return value
    moved = np.empty_like(value)
    for row in range(len(value)):
        head, i = divmod(row, head_dim)
        half, j = divmod(i, head_dim // 2)
        moved[head * head_dim + 2 * j + half] = value[row]
    return moved


def gguf_names(model):
    """The names in transformers by the names in the file."""
    parts = {
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
        **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        **{
            "model.layers": "blk",
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        },
    }
    names = {}
    for name in weights_of(model):
        new = name
        for old, short in parts.items():
            new = new.replace(old, short)
        names[new] = name
    return names


@pytest.mark.parametrize("name", ALL)
def test_gguf_layout(name, tokenizer, tmp_path):
    model = build(name)
    assert to_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32") == tmp_path / "m.gguf"
    metadata, values, types = read_gguf(tmp_path / "m.gguf")
    names, config, skipped = gguf_names(model), model.config, ALL[name][1]
    head_dim = 16 if name == "wide heads" else 8
    if config.tie_word_embeddings:
        names.pop("output.weight")
    scaled = config.rope_parameters["rope_type"] != "default"
    first = (
        {"blk.0.attn_norm.weight": np.ones(32), "blk.0.attn_output.weight": np.zeros((32, 32))} if 0 in skipped else {}
    )
    assert values.keys() == names.keys() | ({"rope_freqs.weight"} if scaled else set()) | first.keys()
    for short, value in first.items():
        np.testing.assert_array_equal(values[short], value)
    for short, full in names.items():
        np.testing.assert_array_equal(values[short], rows_of(full, model.state_dict()[full], head_dim))
    assert set(types.values()) == {"F32"}
    expected = {
        **{"general.architecture": "deci", "general.file_type": 0, "deci.block_count": 4},
        **{"deci.context_length": 128, "deci.embedding_length": 32, "deci.vocab_size": ROWS},
        "deci.feed_forward_length": [48] * 4,
        "deci.attention.head_count": [4] + [0 if i in skipped else 4 for i in range(1, 4)],
        "deci.attention.head_count_kv": [0 if i in skipped else 2 for i in range(4)],
        **{"deci.attention.key_length": head_dim, "deci.attention.value_length": head_dim},
        "deci.rope.dimension_count": head_dim,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["deci.rope.freq_base"] == pytest.approx(config.rope_parameters["rope_theta"])
    assert metadata["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


def test_gguf_rope_factors(tokenizer, tmp_path):
    """The factors divide the default frequencies; llama3's are 1 for short waves and the factor for long ones."""
    for name, expected in {"linear": [4.0] * 4, "llama3": [1.0, None, 8.0, 8.0]}.items():
        model = build(name)
        to_gguf(model.bfloat16(), tokenizer, tmp_path / f"{name}.gguf")
        factors = read_gguf(tmp_path / f"{name}.gguf")[1]["rope_freqs.weight"]
        theta = model.config.rope_parameters["rope_theta"]
        actual = theta ** (-np.arange(4) / 4) / factors
        fresh = type(model.model.rotary_emb)(model.config).inv_freq.numpy()
        np.testing.assert_allclose(actual, fresh, rtol=1e-6)
        for factor, value in zip(factors, expected):
            assert value is None or factor == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 0.0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 5e-3)])
def test_gguf_types(dtype, tolerance, tokenizer, tmp_path):
    model = build()
    to_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    metadata, values, types = read_gguf(tmp_path / "m.gguf")
    kind = dtype.upper()
    assert metadata["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]
    for short, full in gguf_names(model).items():
        expected = rows_of(full, model.state_dict()[full], 8)
        # 48, the width of the FFN, is no multiple of the 32 values of a block of q8_0.
        plain = expected.ndim == 1 or (dtype == "q8_0" and "ffn_down" in short)
        assert types[short] == ("F32" if plain else kind)
        assert np.abs(values[short] - expected).max() <= (0.0 if plain else tolerance) * np.abs(expected).max()


def test_gguf_has_the_models_own_type_by_default(tokenizer, tmp_path):
    for dtype, kind in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        model = build().to(dtype)
        to_gguf(model, tokenizer, tmp_path / "m.gguf")  # replaces the one before
        _, values, types = read_gguf(tmp_path / "m.gguf")
        assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == kind
        np.testing.assert_array_equal(values["token_embd.weight"], model.model.embed_tokens.weight.detach().float())
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_gguf_from_a_folder(tokenizer, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    to_gguf(model, tokenizer, tmp_path / "a.gguf")
    to_gguf(tmp_path / "merged", None, tmp_path / "b.gguf")
    to_gguf(str(tmp_path / "merged"), tokenizer, str(tmp_path / "c.gguf"))
    assert len({(tmp_path / f"{name}.gguf").read_bytes() for name in "abc"}) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_gguf_vocabulary(kind, tmp_path):
    data = TOKENIZERS[kind]()
    tokenizer = wrap(data)
    to_gguf(build(), tokenizer, tmp_path / "m.gguf")
    metadata, _, _ = read_gguf(tmp_path / "m.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == ROWS
    for token, i in tokenizer.get_vocab().items():
        assert tokens[i] == token
    assert tokens[len(tokenizer) :] == [f"[PAD{i}]" for i in range(len(tokenizer), ROWS)]
    assert set(types[len(tokenizer) :]) == {gguf.TokenType.UNUSED}
    assert types[tokenizer.bos_token_id] == types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
    fallback = kind.endswith("in front")
    assert metadata["tokenizer.ggml.model"] == ("llama" if fallback else "gpt2")
    assert metadata["tokenizer.ggml.pre"] == ("default" if fallback else kind)
    assert metadata["tokenizer.ggml.add_bos_token"] is fallback
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.add_space_prefix"] is (kind == "space in front")
    if fallback:
        assert [types[tokens.index(f"<0x{i:02X}>")] for i in range(256)] == [gguf.TokenType.BYTE] * 256
        scores = metadata["tokenizer.ggml.scores"]
        ranked = [a + b for a, b in data["model"]["merges"]]
        assert scores == [-float(ranked.index(t) if t in ranked else len(ranked)) for t in tokens]
    else:
        assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in data["model"]["merges"]]


def test_all_end_tokens_go_along(tokenizer, tmp_path):
    model = build()
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id, 9]
    to_gguf(model, tokenizer, tmp_path / "m.gguf")
    metadata, _, _ = read_gguf(tmp_path / "m.gguf")
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [tokenizer.eos_token_id, 7, 9]
    model.generation_config.eos_token_id = [2, 3, 4, 5]
    with pytest.warns(UserWarning, match=r"room for three tokens .* \[4, 5\] are left out"):
        to_gguf(model, tokenizer, tmp_path / "m.gguf")


def test_several_chat_templates(tmp_path):
    tokenizer = wrap(byte_level())
    tokenizer.chat_template = {"default": "a template", "tool_use": "another"}
    to_gguf(build(), tokenizer, tmp_path / "m.gguf")
    metadata, _, _ = read_gguf(tmp_path / "m.gguf")
    assert metadata["tokenizer.chat_template"] == "a template"
    assert metadata["tokenizer.chat_template.tool_use"] == "another"


def test_unicode_normalization_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="NFC first, which llama.cpp does not"):
        to_gguf(build(), wrap(byte_level("qwen2", normalizer={"type": "NFC"})), tmp_path / "m.gguf")


def test_a_value_too_large_for_float16_leaves_nothing(tokenizer, tmp_path):
    model = build()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight has values that float16 cannot hold.*dtype='bf16'"):
        to_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f16")
    assert not list(tmp_path.iterdir())


def test_gguf_is_needed_for_to_gguf_only(tokenizer, tmp_path, monkeypatch):
    code = "import sys, peft_eas, peft_eas.export; sys.exit('gguf' in sys.modules)"
    run_alone(code, folder=tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("peft_eas.export.gguf_file.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ImportError, match=r"pip install gguf"):
        to_gguf(build(), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# --- refusals --------------------------------------------------------------------------------------------------------


def per_prompt():
    """A model whose record says that its adapters are still in it."""
    model = build()
    model.config.eas = {**model.config.eas, "context": "prompt"}
    return model


def with_lora():
    """A merged model that has got another adapter."""
    return get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"])).base_model.model


def with_meta():
    """A merged model with an offloaded weight."""
    model = build()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.to("meta"))
    return model


def with_heads():
    """A merged classifier."""
    model = build_model("llama", model_class="LlamaForSequenceClassification", num_labels=3)
    names = [name.removeprefix("model.") for name in mha_names("llama", SKIP)]
    config = EASConfig(task_type="SEQ_CLS", skipped_modules=[f"model.{name}" for name in names], context="running")
    return get_peft_model(model, config).merge_and_unload()


REFUSED = {
    "stock": (lambda: build_model("llama"), ValueError, "LlamaForCausalLM is not a merged EAS model"),
    "unmerged": (lambda: build(merge=False), TypeError, r"Received PeftModel.*merge_and_unload\(\)"),
    "nothing": (lambda: None, TypeError, "Received NoneType"),
    "per prompt": (per_prompt, ValueError, r"context='prompt'.*freeze_context\(\)"),
    "qwen3": (
        lambda: make_eas("qwen3", "cpu", SKIP).merge_and_unload(),
        ValueError,
        r"EASQwen3ForCausalLM does not fit.*vLLM.* --model-impl transformers",
    ),
    "gpt2": (lambda: make_eas("gpt2", "cpu", SKIP).merge_and_unload(), ValueError, "EASGPT2LMHeadModel does not fit"),
    "llava": (lambda: make_eas("llava", "cpu", SKIP).merge_and_unload(), ValueError, "EASLlava.* does not fit"),
    "classifier": (with_heads, ValueError, "EASLlamaForSequenceClassification does not fit"),
    "all": (
        *(lambda: make_eas("llama", "cpu", range(4), "running").merge_and_unload(), ValueError),
        "All attentions of this model are deleted.*merge an adapter that keeps one",
    ),
    "mistral's window": (
        lambda: build("mistral", sliding_window=6),
        ValueError,
        r"layers \[0, 3\] see a sliding window",
    ),
    "qwen2's window": (
        *(lambda: make_eas("qwen2", "cpu", SKIP, "running").merge_and_unload(), ValueError),
        r"layers \[0\] see a sliding window \(6 tokens\)",
    ),
    "activation": (lambda: build(hidden_act="gelu"), ValueError, "activation is 'gelu', but .* 'silu'"),
    "rope": (
        *(lambda: build(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), ValueError),
        r"position embedding .*dynamic.* rope_type default, linear, llama3",
    ),
    "lora": (with_lora, ValueError, "has or lacks weights .*lora_A"),
    "offloaded": (with_meta, ValueError, "needs weights in memory"),
    "float64": (lambda: build().double(), ValueError, r"some are torch.float64"),
}


@pytest.mark.filterwarnings("ignore:.*running mean")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_file_is_written(case, tokenizer, tmp_path):
    make, error, message = REFUSED[case]
    model = make()
    with pytest.raises(error, match=message):
        to_decilm(model, tmp_path / "parent" / "out", tokenizer)
    with pytest.raises(error, match=message):
        to_gguf(model, tokenizer, tmp_path / "parent" / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*running mean")
@pytest.mark.parametrize("case", ["stock", "qwen3", "llava", "classifier", "all", "mistral's window"])
def test_refused_from_a_folder(case, tokenizer, tmp_path):
    make, error, message = REFUSED[case]
    make().save_pretrained(tmp_path / "saved")
    with pytest.raises(error, match=message):
        to_decilm(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(error, match=message):
        to_gguf(tmp_path / "saved", tokenizer, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gpt2", "bert", "llava"])
def test_families_that_no_layout_takes(family, tokenizer, tmp_path):
    model = make_eas(family, "cpu", [1], "running").merge_and_unload()
    for export in (lambda: to_decilm(model, tmp_path / "out"), lambda: to_gguf(model, tokenizer, tmp_path / "m.gguf")):
        with pytest.raises(ValueError, match="does not fit DeciLM's layout"):
            export()
    assert list(tmp_path.iterdir()) == []
    for engine in ("vLLM, DeciLM", "MLX-LM", "llama.cpp"):
        seen(engine, family, "The export refuses it: it does not fit DeciLM's layout.")


def test_folders_that_hold_no_merged_model(tokenizer, tmp_path):
    build(merge=False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds an adapter, not a merged model.*PeftModel.from_pretrained\(\)"):
        to_decilm(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"not a folder with a config.json"):
        to_gguf(tmp_path / "missing", tokenizer, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_bad_arguments_of_to_gguf(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"dtype='q4_0' is not one of 'f32', 'f16', 'bf16', 'q8_0'"):
        to_gguf(build(), tokenizer, tmp_path / "m.gguf", dtype="q4_0")
    with pytest.raises(ValueError, match="this is a folder"):
        to_gguf(build(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="Pass a tokenizer"):
        to_gguf(build(), None, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def changed(data, **changes):
    """Tokenizer data with entries "part.key" replaced."""
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = data
        for parent in parents:
            target = target[int(parent) if isinstance(target, list) else parent]
        target[last] = value
    return data


def unigram():
    """A tokenizer that is no BPE."""
    return json.loads(Tokenizer(models.Unigram([("<|begin|>", 0.0), ("<|end|>", 0.0), ("a", -1.0)])).to_str())


def without_a_merge():
    """Byte fallback, one merge missing whose join is a token."""
    data = byte_fallback()
    data["model"]["merges"].pop()
    return data


def merges_mixed_up():
    """Byte fallback, with the merges into one token not beside each other."""
    data = byte_fallback()
    merges = data["model"]["merges"]
    joins = [a + b for a, b in merges]
    twice = next(i for i in range(len(joins) - 1) if joins[i] == joins[i + 1])
    merges.append(merges.pop(twice))
    return data


def without_a_byte():
    """Makes <unk> of one byte."""
    data = changed(byte_level(), model__unk_token="<unk>")
    del data["model"]["vocab"]["ÿ"]
    return data


def without_a_byte_token():
    """Byte fallback that lacks a byte."""
    data = byte_fallback()
    data["model"]["vocab"]["[gone]"] = data["model"]["vocab"].pop("<0xFF>")
    return data


def two_ends():
    """Adds a token that is neither bos nor eos."""
    data = byte_level()
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<unk>", "type_id": 0}}]
    special = {"<unk>": {"id": "<unk>", "ids": [2], "tokens": ["<unk>"]}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    return data


REFUSED_TOKENIZERS = {
    "pre-tokenizer": (lambda: byte_level("unknown"), r"its pre-tokenizer is .*\\w\+.* none of those known"),
    "prefix": (lambda: byte_level("prefix"), "its pre-tokenizer is .*'add_prefix_space': True"),
    "ignore_merges": (lambda: byte_level("gpt-2", ignore_merges=True), "with ignore_merges=True"),
    "normalizer": (lambda: byte_level(normalizer={"type": "Lowercase"}), "its normalizer is .*Lowercase"),
    "unigram": (unigram, "its model is Unigram"),
    "dropout": (lambda: changed(byte_level(), model__dropout=0.1), "dropout.*must be unset"),
    "suffix": (lambda: changed(byte_level(), model__end_of_word_suffix="</w>"), "end_of_word_suffix.*must be unset"),
    "strip": (lambda: changed(byte_level(), added_tokens__0__lstrip=True), r"added tokens \['<\|begin\|>'\] take in"),
    "post-processor": (two_ends, "only bos and eos can be added"),
    "byte": (without_a_byte, "it makes '<unk>' of 1 bytes that its vocabulary lacks"),
    "byte token": (without_a_byte_token, r"its vocabulary lacks the byte tokens \['<0xFF>'\]"),
    "metaspace": (
        lambda: changed(byte_fallback(), normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
        "its normalizer is None and its pre-tokenizer .*Metaspace",
    ),
    "normalized": (
        lambda: changed(byte_fallback(), added_tokens__0__normalized=True),
        "looked for in normalized text",
    ),
    "missing merge": (without_a_merge, "its merges lack"),
    "order of merges": (merges_mixed_up, "stand between those into another token"),
}


@pytest.mark.parametrize("case", REFUSED_TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_have(case, tmp_path):
    make, message = REFUSED_TOKENIZERS[case]
    with pytest.raises(ValueError, match=f"would split text into other tokens.*{message}"):
        to_gguf(build(), wrap(make()), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_slow_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ByT5Tokenizer is not a fast tokenizer"):
        to_gguf(build(), transformers.ByT5Tokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_do_not_fit_the_model(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"tokens up to id 379, but the model's embedding has 61 rows"):
        to_gguf(make_eas("llama", "cpu", SKIP, "running").merge_and_unload(), tokenizer, tmp_path / "m.gguf")
    model = build()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"Neither .* end-of-sequence token.*Set tokenizer.eos_token"):
        to_gguf(model, wrap(byte_level(), eos_token=None), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


# --- the engines -----------------------------------------------------------------------------------------------------


def ask_llama_cpp(folder, file, **request):
    """What llama_cpp_worker.py answers to a request."""
    python = interpreter("PEFT_EAS_LLAMA_CPP_PYTHON")
    (folder / "request.json").write_text(json.dumps({"texts": [], "prompts": [], "num_tokens": 24, **request}))
    return run_worker(python, "llama_cpp_worker.py", file, folder / "request.json")


def ask_vllm(folder, prompts, num_tokens):
    """The new tokens of each prompt in vLLM."""
    (job,) = vllm_jobs([{"folder": str(folder), "prompts": prompts, "num_tokens": num_tokens}], folder.parent)
    return job["tokens"]


def ask_mlx(jobs, folder):
    """What mlx_worker.py makes of jobs."""
    python = interpreter("PEFT_EAS_MLX_PYTHON")
    (folder / "jobs.json").write_text(json.dumps([{"texts": [], "num_tokens": 24, "end": 1, **job} for job in jobs]))
    return run_worker(python, "mlx_worker.py", folder / "jobs.json")


@pytest.fixture(scope="module")
def smollm():
    """(merged SmolLM2, its tokenizer, prompts as texts and as ids, greedy continuations in transformers)."""
    if not any(os.environ.get(f"PEFT_EAS_{engine}_PYTHON") for engine in ("VLLM", "MLX", "LLAMA_CPP")):
        pytest.skip("none of PEFT_EAS_{VLLM,MLX,LLAMA_CPP}_PYTHON names an interpreter that has the engine")
    model, tokenizer = merged_smollm2.load()
    model = merged_smollm2.merge(model)
    texts, prompts = merged_smollm2.prompts(tokenizer)
    return model, tokenizer, texts, prompts, [merged_smollm2.greedy(model, prompt, 32) for prompt in prompts]


def continued(name, lengths, **sizes):
    """(model of a row of ALL, random prompts, their greedy continuations in transformers)."""
    model = build(name, **sizes)
    model.generation_config = GenerationConfig(eos_token_id=1)
    torch.manual_seed(0)
    prompts = [torch.randint(3, ROWS, (length,)).tolist() for length in lengths]
    expected = [merged_smollm2.greedy(model, prompt, 24) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 10
    return model, prompts, expected


def test_smollm2_in_vllm(smollm, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    model, tokenizer, _, prompts, expected = smollm
    biases = [value for name, value in model.state_dict().items() if name.endswith("bias")]
    assert len(biases) == 3 * 15 + 3 * 15
    assert all(value.any() for value in biases)
    assert len(prompts) == 20
    to_decilm(model, tmp_path / "out", tokenizer)
    assert ask_vllm(tmp_path / "out", prompts, 32) == expected


@pytest.mark.parametrize("name", ["all biases", "llama3", "linear", "mistral", "qwen2"])
def test_other_models_in_vllm(name, tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    model, prompts, expected = continued(name, (5, 17, 100), **WIDE)
    to_decilm(model, tmp_path / "out")
    assert ask_vllm(tmp_path / "out", prompts, 24) == expected
    seen("vLLM, DeciLM", ALL[name][0])


def test_a_deleted_first_attention_is_refused_in_vllm(tmp_path):
    interpreter("PEFT_EAS_VLLM_PYTHON")
    with pytest.warns(UserWarning, match="first layer's attention"):
        to_decilm(build("first layer", **WIDE), tmp_path / "out")
    with pytest.raises(AssertionError, match="first layer's attention is deleted"):
        ask_vllm(tmp_path / "out", [[5]], 1)


def test_smollm2_in_mlx(smollm, tmp_path):
    interpreter("PEFT_EAS_MLX_PYTHON")
    model, tokenizer, texts, prompts, expected = smollm
    folder = str(to_decilm(model, tmp_path / "out", tokenizer))
    job = {"folder": folder, "texts": texts, "prompts": prompts, "num_tokens": 32, "end": tokenizer.eos_token_id}
    (result,) = ask_mlx([job], tmp_path)
    assert result["tokens"] == prompts
    assert result["continued"] == expected
    assert result["bytes_per_token"] == 2 * 3 * 64 * 4 * (30 - len(merged_smollm2.SKIPPED))


@pytest.mark.filterwarnings("ignore:The first layer's attention")
def test_other_models_in_mlx(tmp_path):
    interpreter("PEFT_EAS_MLX_PYTHON")
    names = [name for name in ALL if name != "wide heads"]
    jobs, expected = [], {}
    for name in names:
        model, prompts, tokens = continued(name, (1, 5, 17, 100), **WIDE)
        jobs.append({"folder": str(to_decilm(model, tmp_path / name)), "prompts": prompts})
        size = 2 * 2 * 64 * 4 * (4 - len(ALL[name][1]))
        expected[name] = {"tokens": [], "continued": tokens, "bytes_per_token": size}
    assert dict(zip(names, ask_mlx(jobs, tmp_path), strict=True)) == expected
    for family in {ALL[name][0] for name in names}:
        seen("MLX-LM", family)


def test_widths_that_mlx_does_not_have(tmp_path):
    interpreter("PEFT_EAS_MLX_PYTHON")
    folders = [
        to_decilm(build(**WIDE | sizes), tmp_path / str(i))
        for i, sizes in enumerate([{"intermediate_size": 500}, {"head_dim": 32}])
    ]
    ffn, heads = ask_mlx([{"folder": str(folder), "prompts": [[5]]} for folder in folders], tmp_path)
    assert "unexpected keyword argument 'intermediate_size'" in ffn["error"]
    assert "shape" in heads["error"]


def test_smollm2_in_llama_cpp(smollm, tmp_path):
    interpreter("PEFT_EAS_LLAMA_CPP_PYTHON")
    model, tokenizer, texts, prompts, expected = smollm
    to_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32")
    answer = ask_llama_cpp(tmp_path, tmp_path / "m.gguf", texts=texts, prompts=prompts, num_tokens=32)
    assert answer["tokens"] == prompts
    assert answer["pieces"] == texts
    assert answer["ends"] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert answer["metadata"]["tokenizer.chat_template"] == tokenizer.chat_template
    assert answer["continued"] == expected


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_other_types_run_in_llama_cpp(dtype, smollm, tmp_path):
    """Rounded weights say almost the same; they must say something like it."""
    interpreter("PEFT_EAS_LLAMA_CPP_PYTHON")
    model, tokenizer, _, prompts, expected = smollm
    to_gguf(model, tokenizer, tmp_path / "m.gguf", dtype=dtype)
    answer = ask_llama_cpp(tmp_path, tmp_path / "m.gguf", prompts=prompts[:6], num_tokens=4)
    same = sum(a[0] == b[0] for a, b in zip(answer["continued"], expected))
    assert same >= 4


@pytest.mark.parametrize("name", ALL)
def test_tiny_models_in_llama_cpp(name, tokenizer, tmp_path):
    interpreter("PEFT_EAS_LLAMA_CPP_PYTHON")
    model, prompts, expected = continued(name, (5, 17, 40))
    to_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert ask_llama_cpp(tmp_path, tmp_path / "m.gguf", prompts=prompts)["continued"] == expected
    seen("llama.cpp", ALL[name][0])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_in_llama_cpp(kind, tmp_path):
    tokenizer = wrap(TOKENIZERS[kind]())
    to_gguf(build(), tokenizer, tmp_path / "m.gguf")
    alphabet = [*"aeiot 'sS\n\t123.,<>|é中🙂", "  ", "the", "<|end|>", "<|begin|>"]
    generator = np.random.default_rng(0)
    texts = TEXTS + ["".join(generator.choice(alphabet, size=size)) for size in generator.integers(1, 40, 200)]
    actual = ask_llama_cpp(tmp_path, tmp_path / "m.gguf", texts=texts)["tokens"]
    for text, tokens, expected in zip(texts, actual, tokenizer(texts).input_ids):
        assert tokens == expected, text
