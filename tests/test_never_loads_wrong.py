"""A merged checkpoint loads right, or not at all: every way into a stock class is an error that says what to do.

The checkpoints are made in this process, where the package is imported, and most are loaded in another one where it is
not, since importing it must not be what makes the error.
"""

import json

import pytest
import torch
import transformers
from conftest import ALL, FAMILIES, SKIPS, build_model, difference, logits, make_eas, make_inputs
from peft import PeftModel, get_peft_model
from processes import run_alone
from safetensors.torch import load_file
from test_merge import auto_class, load_strictly

from peft_eas import EASConfig
from peft_eas.runtime.record import checksum

SAYS_WHAT_TO_DO = (
    r"EAS checkpoint.*random weights.*Install peft_eas from its repository.*import peft_eas.*Auto class.*"
    r"trust_remote_code=True"
)
# Per family: stock classes that could take the checkpoint, with a head, without, and with another head.
STOCK = {
    "llama": ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"],
    "mistral": ["MistralForCausalLM", "MistralModel", "MistralForTokenClassification"],
    "qwen2": ["Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForQuestionAnswering"],
    "qwen3": ["Qwen3ForCausalLM", "Qwen3Model"],
    "gemma2": ["Gemma2ForCausalLM", "Gemma2Model", "Gemma2ForSequenceClassification"],
    "gemma3": ["Gemma3ForCausalLM", "Gemma3TextModel"],
    "gpt2": ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"],
    "llava": ["LlavaForConditionalGeneration", "LlavaModel", "LlamaForCausalLM", "LlamaModel", "CLIPVisionModel"],
    "bert": ["BertForSequenceClassification", "BertModel", "BertForMaskedLM", "BertLMHeadModel"],
    "vit": ["ViTForImageClassification", "ViTModel"],
}
CASES = [(family, name) for family, names in STOCK.items() for name in names]
# Classes that share no name of a weight with the checkpoint, of the stock model's checkpoint either.
NOTHING_IN_COMMON = [
    ("qwen2", "Qwen2ForQuestionAnswering"),
    ("llava", "LlamaForCausalLM"),
    ("llava", "LlamaModel"),
    ("llava", "CLIPVisionModel"),
]
# Heads that make their body with AutoModel, which obeys the merged config.
BODY_BY_AUTO_MODEL = [
    ("llama", "LlamaForSequenceClassification"),
    ("mistral", "MistralForTokenClassification"),
    ("gemma2", "Gemma2ForSequenceClassification"),
]
# Classes of one family whose config reads another's file without complaint.
FOREIGN = [("mistral", "LlamaForCausalLM"), ("llama", "MistralForCausalLM"), ("qwen2", "LlamaForCausalLM")]


@pytest.fixture(scope="module", params=["half", "all"])
def skip(request):
    """Which MHAs are deleted."""
    return request.param


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, device):
    """Folders of merged checkpoints, by family and skip set."""
    folders = {}

    def get(family, skip):
        if (family, skip) not in folders:
            folders[family, skip] = tmp_path_factory.mktemp(f"{family}-{skip}")
            merged = make_eas(family, device, SKIPS[skip], "running").merge_and_unload()
            merged.save_pretrained(folders[family, skip])
        return folders[family, skip]

    return get


@pytest.mark.parametrize(("family", "name"), CASES)
def test_stock_class(family, name, skip, checkpoints):
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, name).from_pretrained(checkpoints(family, skip))


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": "auto"}, {"dtype": torch.bfloat16},
                                     {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"},
                                     {"device_map": "cpu"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ALL)
def test_stock_class_with_options(family, options, checkpoints):
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, STOCK[family][0]).from_pretrained(checkpoints(family, "half"), **options)


@pytest.mark.parametrize("given", ["stock", "merged"])
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case not in NOTHING_IN_COMMON])
def test_stock_class_with_a_config_given(family, name, given, skip, checkpoints):
    """The lock in the folder's config is not met then: what is left to refuse are the weights."""
    folder = checkpoints(family, skip)
    config = FAMILIES[family][0]() if given == "stock" else transformers.AutoConfig.from_pretrained(folder)
    if given == "stock" or (family, name) not in BODY_BY_AUTO_MODEL:
        with pytest.raises(Exception, match="mismatch"):
            getattr(transformers, name).from_pretrained(folder, config=config)
    else:
        model = getattr(transformers, name).from_pretrained(folder, config=config)
        expected = auto_class(family).from_pretrained(folder)
        inputs = make_inputs(family, "cpu")
        with torch.no_grad():
            actual, expected = (m.base_model(**inputs).last_hidden_state for m in (model, expected))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("family", "name"), FOREIGN)
def test_a_class_of_another_family(family, name, checkpoints):
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, name).from_pretrained(checkpoints(family, "half"))


@pytest.mark.parametrize("family", ALL)
def test_stock_config_class(family, checkpoints):
    """Whoever reads the config by hand to build a model from it is stopped here."""
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        type(FAMILIES[family][0]()).from_pretrained(checkpoints(family, "half"))


@pytest.mark.parametrize("name", ["CLIPVisionConfig", "LlamaConfig"])
def test_config_class_of_a_part_of_llava(name, checkpoints):
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, name).from_pretrained(checkpoints("llava", "half"))


@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_with_its_model_type_set_back(family, checkpoints, tmp_path):
    """Someone who "repairs" the model type so that an old tool takes it gets the error all the same."""
    folder = checkpoints(family, "half")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = FAMILIES[family][0]().model_type
    config["architectures"] = [FAMILIES[family][1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path)
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_record_that_does_not_fit(family, checkpoints, tmp_path):
    folder = checkpoints(family, "half")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    good = json.loads((folder / "config.json").read_text())
    for change, message in (
        (lambda eas: None, r"needs the record `eas`.*config.json"),
        (lambda eas: {**eas, "skipped": {}}, r"(?i)mismatch|size|shape"),
        (lambda eas: {**eas, "skipped": {"layers.77": next(iter(eas["skipped"].values()))}}, r"layers\.77.*no such"),
        (lambda eas: {**eas, "biases": [*eas["biases"], "layers.9.mlp"]}, r"layers\.9\.mlp.*no such"),
    ):
        record = change(good["eas"])
        config = {**good, "eas": record and {**record, "checksum": checksum(record)}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(Exception, match=message):
            transformers.AutoModel.from_pretrained(tmp_path)


_SUBPROCESS = """
import json, sys
import transformers
messages = []
for name, folder in json.loads(sys.argv[1]):
    try:
        if name[0].isupper():
            getattr(transformers, name).from_pretrained(folder)
        else:
            transformers.pipeline(name, model=folder)
    except Exception as error:
        messages.append(str(error))
    else:
        sys.exit(f"{name} loaded {folder}")
assert not any(name.startswith("peft_eas") for name in sys.modules)
print("\\n" + json.dumps(messages))
"""

PIPELINES = {"bert": "text-classification", "vit": "image-classification", "llava": "image-text-to-text"}


def test_without_the_package(checkpoints):
    """In a process of its own, which does not import the package."""
    cases = [
        *((family, auto_class(family).__name__) for family in ALL),
        *((family, name) for family in ALL for name in ("AutoConfig", "AutoModel")),
        *((family, PIPELINES.get(family, "text-generation")) for family in ALL),
        ("qwen2", "Qwen2ForCausalLM"),
        ("gpt2", "GPT2Model"),
    ]
    argument = json.dumps([(name, str(checkpoints(family, "half"))) for family, name in cases])
    printed = run_alone(_SUBPROCESS, argument, folder=checkpoints("llama", "half"))
    for (family, name), message in zip(cases, json.loads(printed.splitlines()[-1])):
        # An Auto class and a pipeline name the way without the package; a stock class meets the lock.
        is_stock = name[0].isupper() and not name.startswith("Auto")
        assert ("Install peft_eas from its repository" if is_stock else "trust_remote_code=True") in message, (
            family,
            name,
            message,
        )


@pytest.mark.parametrize("family", ALL)
def test_auto_classes_load_it_right(family, checkpoints, device):
    """The other side of the coin: with the package, the same folder is the merged model."""
    merged = make_eas(family, device, SKIPS["half"], "running").merge_and_unload()
    inputs = make_inputs(family, device)
    loaded = load_strictly(auto_class(family), checkpoints(family, "half")).to(device)
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_only_biases_were_added(family, device, tmp_path):
    """Nothing is skipped, but the folded biases would be dropped by a stock class in silence."""
    model = make_eas(family, device, [], "running")
    inputs = make_inputs(family, device)
    expected = logits(model, inputs)
    model.merge_and_unload().save_pretrained(tmp_path)
    if family == "qwen2":  # its projections have biases anyway, so that a stock class is right
        assert difference(logits(transformers.Qwen2ForCausalLM.from_pretrained(tmp_path), inputs), expected) <= 1e-5
    else:
        with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
            getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert difference(logits(loaded, inputs), expected) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit"])
def test_ignore_mismatched_sizes(family, checkpoints, device):
    """Asking for mismatches to be ignored is no way around the config."""
    with pytest.raises(Exception, match=SAYS_WHAT_TO_DO):
        getattr(transformers, FAMILIES[family][1]).from_pretrained(
            checkpoints(family, "half"), ignore_mismatched_sizes=True
        )


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit"])
def test_loading_the_state_dict_into_a_stock_model(family, checkpoints, device):
    weights = load_file(checkpoints(family, "half") / "model.safetensors", device=device)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_model(family, device).load_state_dict(weights, strict=False)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_for_the_base_does_not_load_on_the_merged_model(family, checkpoints, device, tmp_path):
    make_eas(family, device, SKIPS["half"]).save_pretrained(tmp_path)
    merged = auto_class(family).from_pretrained(checkpoints(family, "half")).to(device)
    inputs = make_inputs(family, device)
    expected = logits(merged, inputs)
    with pytest.raises(ValueError, match="was made for a model before its merge"):
        PeftModel.from_pretrained(merged, tmp_path)
    assert torch.equal(logits(merged, inputs), expected)


def test_targets_in_a_merged_model_are_what_is_left(checkpoints, device):
    merged = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("llama", "half")).to(device)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.*cannot be skipped"):
        get_peft_model(merged, EASConfig(skipped_modules=["model.layers.0.self_attn"]))
    assert len(get_peft_model(merged, EASConfig(num_skip=1)).candidates) == 2


@pytest.mark.parametrize("context", ["running", "prompt"])
def test_a_head_that_names_its_body_otherwise(context, tmp_path):
    merged = make_eas("llama", "cpu", SKIPS["half"], context).merge_and_unload(context=context)
    merged.save_pretrained(tmp_path)
    auto = transformers.AutoModelForQuestionAnswering
    with pytest.raises(ValueError, match=r"EASLlamaForQuestionAnswering names its weights otherwise.*with AutoModel"):
        auto.from_pretrained(tmp_path)
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "body")
    inputs = make_inputs("llama", "cpu")
    body = auto.from_pretrained(tmp_path / "body").transformer
    with torch.no_grad():
        assert torch.equal(body(**inputs).last_hidden_state, merged.model(**inputs).last_hidden_state)
