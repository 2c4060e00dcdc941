"""Merged checkpoints in other hands: loaded with and without the package, whole, sharded, in parts, and damaged."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ALL, SKIPS, add_eas, build_model, logits, make_eas, make_inputs, mha_names
from peft import get_peft_model
from processes import run_alone
from safetensors.torch import load_file, save_file
from test_merge import auto_class, load_strictly
from torch.utils._python_dispatch import TorchDispatchMode

from peft_eas import EASConfig
from peft_eas.runtime.checkpoint import CODE_FILE, CODE_PARTS, code_text
from peft_eas.runtime.record import FORMAT, checksum

CONTEXTS = ["running", "prompt"]
ADVICE = r"Copy or download .* again, with config.json as it was saved"
# Beside the families' own models: name → (family, class without a head, changes of the config).
VARIANTS = {
    "llama-tied": ("llama", None, {"tie_word_embeddings": True}),
    "gemma2-tied": ("gemma2", None, {"tie_word_embeddings": True}),
    "bert-headless": ("bert", "BertModel", {}),
    "vit-headless": ("vit", "ViTModel", {}),
    "llama-headless": ("llama", "LlamaModel", {}),
}
MODELS = [*ALL, *VARIANTS]


def make_merged(name, context, device="cpu"):
    """A merged model with two of four MHAs deleted, inputs for it, and the name of its Auto class."""
    family, headless, changes = VARIANTS.get(name, (name, None, {}))
    if headless is None:
        model = add_eas(build_model(family, device, **changes), family, SKIPS["half"], context)
    else:
        names = [name.partition(".")[2] for name in mha_names(family, SKIPS["half"])]
        config = EASConfig(r=8, attention_r=4, init_weights=False, context=context, skipped_modules=names)
        torch.manual_seed(1)
        model = get_peft_model(build_model(family, device, headless), config).eval()
    inputs = make_inputs(family, device)
    if name in ("bert", "llama"):
        inputs["attention_mask"][0, :3] = 0
    merged = model.merge_and_unload(context=context)
    return merged, inputs, "AutoModel" if headless else auto_class(family).__name__


@pytest.fixture(scope="module")
def saved(tmp_path_factory, device):
    """By model and context: the folder of a merged checkpoint, with the inputs and logits of the model beside it."""
    folders = {}

    def get(name, context="running"):
        if (name, context) not in folders:
            folder = tmp_path_factory.mktemp(f"{name}-{context}")
            merged, inputs, auto = make_merged(name, context, device)
            torch.save((inputs, logits(merged, inputs)), folder / "expected.pt")
            merged.save_pretrained(folder)
            folders[name, context] = folder, auto
        return folders[name, context]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a checkpoint, to be spoilt."""

    def get(name, context="running"):
        folder, auto = saved(name, context)
        return Path(shutil.copytree(folder, tmp_path / name)), getattr(transformers, auto)

    return get


_WORKER = """
import json, sys, torch, transformers
package, *jobs = json.loads(sys.argv[1])
if package:
    sys.modules["matplotlib.figure"] = None  # as `cards_without_pictures` of conftest.py
    import peft_eas
options = {} if package else {"trust_remote_code": True}
for folder, auto, again in jobs:
    inputs, expected = torch.load(folder + "/expected.pt")
    for folder in (folder, again):
        model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        model.to(expected.device)
        with torch.no_grad():
            output = model(**inputs)
        actual = output["logits"] if "logits" in output else output["last_hidden_state"]
        assert torch.equal(actual, expected), (folder, (actual - expected).abs().max())
        assert (type(model).__module__ == "peft_eas.runtime.merged") == package, type(model)
        if folder != again:
            model.save_pretrained(again)
    transformers.AutoModel.from_pretrained(again, **options)
if not package:
    assert not any(name.startswith("peft_eas") for name in sys.modules)
"""


@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without"])
def test_in_another_process(package, saved, tmp_path):
    """Bit-equal, and once more after having been saved there."""
    jobs = []
    for name in MODELS:
        for context in CONTEXTS:
            folder, auto = saved(name, context)
            jobs.append([str(folder), auto, str(tmp_path / f"{name}-{context}")])
    run_alone(_WORKER, json.dumps([package, *jobs]), folder=tmp_path)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved(name, context, saved):
    folder, _ = saved(name, context)
    config = json.loads((folder / "config.json").read_text())
    classes = config["auto_map"]
    assert all(value.startswith("modeling_eas.EAS") for value in classes.values())
    assert {"AutoConfig", "AutoModel"} <= set(classes)
    assert (folder / CODE_FILE).read_text() == code_text()
    weights = load_file(folder / "model.safetensors")
    assert any("eas_adapter" in key for key in weights) == (context == "prompt")
    assert not any("running_context" in key for key in weights)


def test_the_code_file_stands_alone():
    tree = ast.parse(code_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in imported if name} <= set(sys.stdlib_module_names) | {
        *("torch", "transformers", "safetensors", "huggingface_hub")
    }
    defined = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    assert len(defined) == len(set(defined)), "two of its modules define the same name"
    assert {n.level for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} == {0}
    assert len(CODE_PARTS) == len(set(CODE_PARTS))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16},
                                     {"dtype": "auto"}, {"attn_implementation": "eager"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_options_of_from_pretrained(name, context, options, saved, device):
    folder, auto = saved(name, context)
    inputs, expected = torch.load(folder / "expected.pt")
    model = load_strictly(getattr(transformers, auto), folder, **options).to(device)
    actual = logits(model, inputs)
    if options.get("dtype") == torch.bfloat16:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(actual).all()
    elif "attn_implementation" in options:
        if "gemma2" in name:  # its soft cap is in its eager kernel, which older versions do not choose
            return
        # What stands in the place of padding has no meaning.
        kept = inputs["attention_mask"].bool() if actual.dim() == 3 and "attention_mask" in inputs else slice(None)
        torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_shards(name, context, saved, tmp_path, device):
    folder, auto = saved(name, context)
    inputs, expected = torch.load(folder / "expected.pt")
    model = load_strictly(getattr(transformers, auto), folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_strictly(getattr(transformers, auto), tmp_path).to(device)
    assert torch.equal(logits(loaded, inputs), expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_offloading_to_disk(context, saved, tmp_path):
    folder, auto = saved("llama", context)
    inputs, expected = torch.load(folder / "expected.pt", map_location="cpu")
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    options = {"device_map": {**dict.fromkeys(names, "cpu"), "model.layers": "disk"}, "offload_folder": str(tmp_path)}
    if context == "running":
        model = getattr(transformers, auto).from_pretrained(folder, **options)
        assert torch.equal(logits(model, inputs), expected)
    else:
        with pytest.raises(ValueError, match=r"device_map offloads adapters.*offloads nothing"):
            getattr(transformers, auto).from_pretrained(folder, **options)


class Allocations(TorchDispatchMode):
    """Shapes of every tensor that was made outside the meta device."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.shapes.add(tuple(tensor.shape))
        return result


def test_deleted_attention_is_never_allocated(tmp_path, device):
    """All MHAs are deleted from a model whose projections have a shape that nothing else has."""
    base = build_model("llama", device, head_dim=14)
    with Allocations() as allocations:
        base.save_pretrained(tmp_path / "base")
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    projection = tuple(base.model.layers[0].self_attn.q_proj.weight.shape)
    assert projection in allocations.shapes  # this is how it would show
    model = get_peft_model(base, EASConfig(skipped_modules=mha_names("llama"), context="running"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    with Allocations() as allocations:
        load_strictly(transformers.AutoModelForCausalLM, tmp_path / "merged")
    assert projection not in allocations.shapes
    assert (48, 32) in allocations.shapes  # the FFN's


def test_a_tokenizer_goes_along(tmp_path):
    merged, _, _ = make_merged("llama", "running")
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(vocabulary), unk_token="<unk>", eos_token="b"
    )
    merged.save_pretrained(tmp_path, processing_class=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a b c").input_ids == [1, 2, 0]
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path))
    text = pipeline("a b", max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("a b")


def _word_tokenizer(vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_cut_short(name, copied):
    folder, auto = copied(name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"cannot be read.*{ADVICE}"):
        auto.from_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_is_missing(name, copied):
    """Of the body or of the head; stock classes would draw it at random and only warn."""
    folder, auto = copied(name)
    weights = load_file(folder / "model.safetensors")
    for lost in (next(k for k in weights if "mlp" in k or "intermediate" in k), list(weights)[-1]):
        kept = {key: value for key, value in weights.items() if key != lost}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks [12] of the weights.*{ADVICE}"):
            auto.from_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_shard(name, saved, tmp_path):
    folder, auto = saved(name)
    auto = getattr(transformers, auto)
    auto.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match=rf"model-00002-of.*{ADVICE}"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_another_layer_in_the_config(name, context, copied):
    folder, auto = copied(name, context)
    good = json.loads((folder / "config.json").read_text())
    first, second = good["eas"]["skipped"].items()
    moved = (first[0].replace("0", "1", 1), first[1])
    for skipped in (dict([first, second, moved]), dict([first]), dict([moved, second]), {}):
        record = {**good["eas"], "skipped": skipped}
        # The weights do not fit, even if the record fits its checksum.
        sealed = {**record, "checksum": checksum(record)}
        for eas, message in (
            (record, r"record `eas` in config.json.*is not as it was saved.*Restore config.json"),
            (sealed, rf"shapes that its config asks for.*{ADVICE}|leave `eas` as it is"),
        ):
            (folder / "config.json").write_text(json.dumps({**good, "eas": eas}))
            with pytest.raises(ValueError, match=message):
                auto.from_pretrained(folder)


@pytest.mark.parametrize("context", CONTEXTS)
def test_any_other_change_of_the_record(context, copied):
    """Some of these would load without a misfit, and compute something else."""
    folder, auto = copied("llama", context)
    good = json.loads((folder / "config.json").read_text())
    paths = list(_paths(good["eas"]))
    assert len(paths) > 20
    for path in paths:
        config = json.loads(json.dumps(good))
        place = config["eas"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "other" if place[path[-1]] != "other" else None
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"record `eas`"):
            auto.from_pretrained(folder)


def _paths(tree):
    """Paths to all values of a record, but for those that only tell where it comes from."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key == "origin":
            continue
        if isinstance(value, (dict, list)):
            yield from ((key, *path) for path in _paths(value))
        else:
            yield (key,)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_weights_of_another_checkpoint(name, saved, copied):
    """Merged in another way, with the same attentions gone."""
    folder, auto = copied(name, "running")
    shutil.copy(saved(name, "prompt")[0] / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"weights that its config tells nothing of.*belong to another model"):
        auto.from_pretrained(folder)


def test_a_record_given_beside_the_folder(copied):
    folder, auto = copied("llama")
    record = json.loads((folder / "config.json").read_text())["eas"]
    with pytest.raises(ValueError, match=r"record `eas`.*is not as it was saved"):
        auto.from_pretrained(folder, eas={**record, "biases": []})


def test_another_family_in_the_config(copied):
    folder, _ = copied("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "eas_gemma2"}))
    with pytest.raises(ValueError, match=r"record `eas`.*is not as it was saved"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_record_of_another_format(copied):
    folder, auto = copied("llama")
    config = json.loads((folder / "config.json").read_text())
    config["eas"]["format"] = FORMAT + 1
    (folder / "config.json").write_text(json.dumps(config))
    message = rf"has format {FORMAT + 1}, but this code reads format {FORMAT}.*Install peft_eas from its repository"
    with pytest.raises(ValueError, match=message):
        auto.from_pretrained(folder)


_WITHOUT_CODE = """
import sys, transformers
for options in ({}, {"trust_remote_code": True}):
    try:
        getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], **options)
    except Exception as error:
        print(str(error).replace("\\n", " "))
    else:
        sys.exit("it was loaded")
"""


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_the_code_file_is_gone(name, copied, tmp_path):
    folder, auto = copied(name)
    (folder / CODE_FILE).unlink()
    auto.from_pretrained(folder)  # the package needs no such file
    printed = run_alone(_WITHOUT_CODE, folder, auto.__name__, folder=tmp_path)
    assert "trust_remote_code=True" in printed
    assert CODE_FILE in printed


def test_ranks_other_than_the_first_write_nothing(tmp_path, device):
    merged = make_eas("llama", device, SKIPS["half"], "running").merge_and_unload()
    merged.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
