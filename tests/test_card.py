"""What a model card says is right, is what the Hub takes, and does not cost the user a word of their own."""

import re
import shutil
import socket
import sys
import time
import warnings

import huggingface_hub
import pytest
import torch
import transformers
from conftest import FAMILIES, SKIPS, add_eas, build_model, logits, make_eas, make_inputs, mha_names
from hub_metadata import metadata_problems
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, metadata_load
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_alone
from safetensors.torch import load_file
from test_merge import auto_class

from peft_eas.reporting import provenance
from peft_eas.reporting.card import PICTURE, PLACEHOLDER, record_speed
from peft_eas.reporting.card_file import BEGIN, END

pytestmark = pytest.mark.usefixtures("pictures")

PIPELINES = {
    "llama": "text-generation",
    "bert": "text-classification",
    "vit": "image-classification",
    "llava": "image-text-to-text",
}
KINDS = ["adapter", "merged"]


class Saved:
    """A base, an adapter and the merged model of a family, saved; and what is to be known of them."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        base = build_model(family)
        base.save_pretrained(folder / "base")
        (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
        self.base_size = base.num_parameters()
        base = getattr(transformers, FAMILIES[family][1]).from_pretrained(folder / "base")
        model = add_eas(base, family, SKIPS["half"], "running", r=8, attention_r=4)
        self.scores = {name: 0.25 * (-1) ** i for i, name in enumerate(mha_names(family))}
        model.peft_config["default"].scores = self.scores
        self.trainable, self.all_parameters = model.get_nb_trainable_parameters()
        self.inputs = make_inputs(family, "cpu")
        self.expected = {"adapter": logits(model, self.inputs)}
        model.save_pretrained(folder / "adapter")
        self.adapter, self.merged = model, None
        merged = add_eas(base_of(folder, family), family, SKIPS["half"], "running", r=8, attention_r=4)
        merged.peft_config["default"].scores = self.scores
        self.merged = merged.merge_and_unload()
        self.expected["merged"] = logits(self.merged, self.inputs)
        record_speed(self.merged, device="2 CPU cores", prefill=1.5, conditions="batch of 8")
        self.merged.save_pretrained(folder / "merged")

    def card(self, kind):
        return ModelCard.load(self.folder / kind / "README.md")


def base_of(folder, family):
    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folder / "base")


@pytest.fixture(scope="module", params=list(PIPELINES))
def saved(request, tmp_path_factory):
    return Saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def llama(tmp_path):
    """An adapter on a base without a name."""
    return make_eas("llama", "cpu", SKIPS["half"], "running")


def rows(card):
    """The two columns of the card's first table."""
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE)
    return {label: value for label, value in found if not label.startswith(("`", "---"))}


def test_without_a_context(tmp_path):
    model = make_eas("llama", "cpu", SKIPS["half"], "none")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for kind in KINDS:
        facts = rows(ModelCard.load(tmp_path / kind / "README.md"))
        assert facts["Context"] == "none, the adapters read each token alone"
        assert facts["Up-projections"] == "1, without a router"


def test_attentions_that_are_never_skipped(tmp_path):
    model = make_eas("llava", "cpu", SKIPS["half"], "running", kept_modules=r".*vision_tower.*")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for kind, fate in zip(KINDS, ("skipped", "deleted"), strict=True):
        facts = rows(ModelCard.load(tmp_path / kind / "README.md"))
        assert facts[f"Attentions {fate}"] == "2 of 4"
        assert facts["Attentions never skipped"] == "4 more, with adapters"


def test_how_to_load_an_adapter_comes_first(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    before, _, after = ModelCard.load(tmp_path / "README.md").text.partition("## Efficient Attention Skipping\n\n")
    assert after.startswith("**Install peft_eas from its repository, and `import peft_eas` before you load")
    assert "`KeyError: 'EAS'`" in after.splitlines()[0]
    assert [line for line in before.splitlines() if line] == ["# EAS adapter for a llama model", BEGIN]


@pytest.mark.parametrize("kind", KINDS)
def test_no_card_sends_to_pypi(kind, saved):
    text = saved.card(kind).text
    assert "pip install" not in text
    assert "Install peft_eas from its repository" in text


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_front_matter(kind, saved):
    card = saved.card(kind)
    assert metadata_problems(card.content) == ([], [])
    data = card.data.to_dict()
    assert metadata_load(saved.folder / kind / "README.md") == data
    assert data["library_name"] == {"adapter": "peft", "merged": "transformers"}[kind]
    assert data["pipeline_tag"] == PIPELINES[saved.family]
    assert data["license"] == "apache-2.0"
    expected = {"arxiv:2403.15226", "efficient-attention-skipping", "peft_eas"}
    expected |= {"transformers"} if kind == "adapter" else set()
    expected |= {"custom_code"} if (saved.folder / kind / "modeling_eas.py").exists() else set()
    assert data["tags"] == sorted(expected)
    assert "base_model" not in data  # a folder is no model's id


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith(("0.", "1.")), reason="asks huggingface.co, whatever is set"
)
def test_the_hub_takes_them(saved, monkeypatch):
    """By the client's own check, which asks the Hub."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for kind in KINDS:
            saved.card(kind).validate()
        card = saved.card("adapter")
        card.data.base_model, card.data.license = str(saved.folder / "base"), "my-own"
        with pytest.raises(ValueError, match=r"license.* must be one of.*base_model.* is not valid"):
            card.validate()


def test_facts_of_the_adapter(saved):
    facts = rows(saved.card("adapter"))
    file = load_file(saved.folder / "adapter" / "adapter_model.safetensors")
    assert facts["Base model"] == "`base`"
    assert facts["Attentions skipped"] == "2 of 4"
    assert facts["Rank"] == "8 for a skipped attention and 8 beside its FFN's output, 4 for a kept one"
    assert facts["Up-projections"] == "2, mixed by a router"
    share = 100 * saved.trainable / saved.all_parameters
    assert facts["Trainable parameters"] == f"{saved.trainable:,} ({share:.2f} % of all)"
    assert facts["Numbers in the adapter's file"] == f"{sum(tensor.numel() for tensor in file.values()):,}"
    assert facts["License of the base"] == "apache-2.0"
    task = {"bert": " (SEQ_CLS)", "vit": ""}.get(saved.family, " (CAUSAL_LM)")
    assert facts["Task"] == PIPELINES[saved.family] + task


def test_facts_of_the_merged_model(saved):
    facts = rows(saved.card("merged"))
    file = load_file(saved.folder / "merged" / "model.safetensors")
    size = sum(tensor.numel() for tensor in file.values())
    assert facts["Attentions deleted"] == "2 of 4"
    assert facts["Parameters"] == f"{size:,} ({100 * (size / saved.base_size - 1):+.1f} % against the base)"
    assert facts["Parameters trained"] == f"{saved.trainable:,}"
    assert "| 2 CPU cores | 1.50× |  | the base model | batch of 8 |" in saved.card("merged").text


@pytest.mark.parametrize("kind", KINDS)
def test_skip_map(kind, saved):
    text = saved.card(kind).text
    for i, (name, score) in enumerate(saved.scores.items()):
        assert f"| `{name}` | {'skipped' if i in SKIPS['half'] else 'kept'} | {score:+.4f} |" in text
    assert f"({PICTURE})" in text
    assert (saved.folder / kind / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_what_the_search_found(tmp_path):
    model = make_eas("llama", "cpu", SKIPS["half"], "running")
    config, names = model.peft_config["default"], mha_names("llama")
    config.scores = dict(zip(names, (-0.03, -3.0, -0.01, -0.2)))
    curve = {"num_skip": [0, 1, 2, 3, 4], "increase": [0.0, 0.01, 0.04, 0.24, 3.24], "deviation": [0.001] * 5}
    measured = [{"num_skip": 2, "increase": 0.05, "deviation": 0.002}]
    savings = {"unit": "bytes", "total": 4.0, "per_candidate": [1.0] * 4}
    config.search = {"strategy": "ThompsonSampling", "curve": curve, "measured": measured, "savings": savings}
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for kind in KINDS:
        text = ModelCard.load(tmp_path / kind / "README.md").text
        assert "The search (ThompsonSampling) chose 2 of 4 candidates to skip." in text
        assert "nothing skipped by +5.1 ± 0.2 % (measured)." in text
        assert "| Skipped | Change of the loss, expected | Measured | KV cache left |" in text
        assert "| 2, the choice | +4.1 ± 0.1 % | +5.1 ± 0.2 % | 50 % |" in text
        assert "| 4 | ×25.5 ± 0.0 |  | 0 % |" in text
        assert "by how much skipping an attention raises the loss, against the mean of those that were chosen." in text
        # The mean cost of the first and the third is 0.02.
        assert f"| `{names[0]}` | skipped | +1.0 % |" in text
        assert f"| `{names[1]}` | kept | ×19.7 |" in text


def test_a_search_by_the_bandit_names_it_and_keeps_its_scores(tmp_path):
    model = make_eas("llama", "cpu", SKIPS["half"], "running")
    config, names = model.peft_config["default"], mha_names("llama")
    config.scores = dict(zip(names, (0.5, -0.25, 0.125, 0.0)))
    config.search = {"strategy": "AttentionBandit", "curve": None, "measured": []}
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "The search (AttentionBandit) chose 2 of 4 candidates to skip.\n" in text
    assert "| Skipped |" not in text
    assert f"| `{names[0]}` | skipped | +0.5000 |" in text


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_private_is_in_it(kind, saved):
    content = saved.card(kind).content
    assert str(saved.folder) not in content
    assert saved.folder.parts[1] + "/" not in content
    assert "hf_" not in content


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_in_it_runs(kind, saved):
    first, *others = re.findall(r"```python\n(.*?)```", saved.card(kind).text, re.DOTALL)
    code = first.replace(PLACEHOLDER, str(saved.folder / kind))
    code = code.replace("path/to/the/base/model", str(saved.folder / "base"))
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"].eval(), saved.inputs), saved.expected[kind])
    assert len(others) == (kind == "merged")
    if others:
        torch.save((saved.inputs, saved.expected[kind]), saved.folder / "expected.pt")
        code = others[0].replace(PLACEHOLDER, str(saved.folder / kind)) + (
            "\nimport sys, torch\ninputs, expected = torch.load(sys.argv[1])\nwith torch.no_grad():\n"
            "    actual = model(**inputs).logits\nassert torch.equal(actual, expected)\n"
            "assert 'peft_eas' not in sys.modules\n"
        )
        run_alone(code, saved.folder / "expected.pt", folder=saved.folder)


def test_saving_twice_gives_the_same_card(saved, tmp_path):
    for kind, model in (("adapter", saved.adapter), ("merged", saved.merged)):
        before = {name: (saved.folder / kind / name).read_bytes() for name in ("README.md", PICTURE)}
        shutil.copytree(saved.folder / kind, tmp_path / kind)
        model.save_pretrained(tmp_path / kind)
        assert {name: (tmp_path / kind / name).read_bytes() for name in before} == before


def test_a_loaded_model_is_saved_with_the_same_card(saved, tmp_path):
    adapter = PeftModel.from_pretrained(base_of(saved.folder, saved.family), saved.folder / "adapter")
    adapter.save_pretrained(tmp_path / "adapter")
    auto_class(saved.family).from_pretrained(saved.folder / "merged").save_pretrained(tmp_path / "merged")
    for kind in KINDS:
        again = ModelCard.load(tmp_path / kind / "README.md")
        assert (again.text, again.data.to_dict()) == (saved.card(kind).text, saved.card(kind).data.to_dict())


# --- the base on the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def named_base(tmp_path, monkeypatch):
    """A base of the name org/base, whose card is in the client's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT asks the Hub for the base's config
    folder = tmp_path / "cache" / "models--org--base"
    (folder / "snapshots" / "0" / "x").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    front = "license: other\nlicense_name: our-own\nlicense_link: LICENSE.md"
    (folder / "snapshots" / "0" / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    provenance._license_on_hub.cache_clear()
    yield build_model("llama", _name_or_path="org/base")
    provenance._license_on_hub.cache_clear()


def test_a_base_on_the_hub(named_base, tmp_path):
    named_base.name_or_path = "org/base"
    model = add_eas(named_base, "llama", SKIPS["half"], "running")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for kind, relation in (("adapter", "adapter"), ("merged", "finetune")):
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert metadata_problems(card.content) == ([], [])
        assert (card.data.base_model, card.data.base_model_relation) == ("org/base", relation)
        assert (card.data.license, card.data.license_name) == ("other", "our-own")
        assert card.data.license_link == "https://huggingface.co/org/base/blob/main/LICENSE.md"
        assert ("base_model:adapter:org/base" in card.data.tags) == (kind == "adapter")
        assert rows(card)["Base model"] == "[org/base](https://huggingface.co/org/base)"
        assert rows(card)["License of the base"] == "our-own"
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in ModelCard.load(tmp_path / "adapter/README.md").text


def test_a_license_that_cannot_be_looked_up(monkeypatch):
    """Neither a Hub that is not there nor one that never answers holds up or fails a save."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for number, port in enumerate((1, silent.getsockname()[1])):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            monkeypatch.setattr(provenance, "LICENSE_TIMEOUT", 0.5)
            start = time.monotonic()
            assert provenance.base_license(f"org/nowhere-{number}") == {}
            assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", [None, "", "/no/such/folder", "./base", "a/b/c", "C:\\base"])
def test_what_is_no_id_on_the_hub(name):
    assert provenance.hub_id_of(name) is None
    assert provenance.base_license(name) == {}


# --- what was there before -------------------------------------------------------------------------------------------


def test_the_users_own_card_is_kept(llama, tmp_path):
    own = """---
language: de
license: mit
pipeline_tag: summarization
base_model: org/other
tags:
- mine
---
# My model

My own words.
"""
    merged_folder, adapter_folder = tmp_path / "merged", tmp_path / "adapter"
    for folder in (merged_folder, adapter_folder):
        folder.mkdir()
        (folder / "README.md").write_text(own)
    for _ in range(2):
        llama.save_pretrained(adapter_folder)
    merged = llama.merge_and_unload()
    for _ in range(2):
        merged.save_pretrained(merged_folder)
    for folder in (merged_folder, adapter_folder):
        card = ModelCard.load(folder / "README.md")
        assert card.text.startswith("# My model\n\nMy own words.\n")
        assert card.text.count(BEGIN) == card.text.count(END) == 1
        assert (card.data.language, card.data.license, card.data.pipeline_tag) == ("de", "mit", "summarization")
        assert card.data.base_model == "org/other"
        assert {"mine", "peft_eas"} <= set(card.data.tags)


def test_words_around_the_section_are_kept(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    before, after = path.read_text().split(BEGIN)
    path.write_text(f"{before}Above.\n\n{BEGIN}{after.rstrip()}\n\nBelow.\n")
    llama.set_skipped_modules(mha_names("llama", [0, 2]))
    llama.save_pretrained(tmp_path)
    text = path.read_text()
    assert re.search(rf"Above\.\n\n{re.escape(BEGIN)}", text)
    assert text.endswith("Below.\n")


def test_the_empty_template_gives_way_and_a_filled_one_stays(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in text
    assert re.search(r"### Framework versions\n\n- PEFT \d", text)
    card = ModelCard.from_template(ModelCard("---\n\n---\n").data, developers="Me")
    card.save(tmp_path / "README.md")
    llama.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "**Developed by:** Me" in text
    assert BEGIN in text


@pytest.mark.parametrize("line", ["base_model: 3", "tags: word", "base_model: [1, 2]"])
def test_odd_front_matter(line, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{line}\n---\n# Mine\n")
    make_eas("llama", "cpu", SKIPS["half"], "running").merge_and_unload().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "# Mine" in card.text
    assert "peft_eas" in card.data.tags
    assert "base_model" not in card.data.to_dict()


@pytest.mark.parametrize("line", ["license: [mit", "tags: 3"])
def test_front_matter_that_cannot_be_read(line, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{line}\n---\nMine\n")
    llama = make_eas("llama", "cpu", SKIPS["half"], "running")
    with pytest.warns(UserWarning, match=r"front matter of .*README.md cannot be read.*left as it is.*save again"):
        llama.merge_and_unload().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"---\n{line}\n---\nMine\n"
    assert (tmp_path / "model.safetensors").exists()


def test_other_methods_cards_are_peft_s(tmp_path):
    get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "peft_eas" not in text
    assert "More Information Needed" in text


# --- circumstances ---------------------------------------------------------------------------------------------------


def test_without_matplotlib(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    llama.save_pretrained(tmp_path / "adapter")
    llama.merge_and_unload().save_pretrained(tmp_path / "merged")
    for kind in KINDS:
        text = (tmp_path / kind / "README.md").read_text()
        assert PICTURE not in text
        assert not (tmp_path / kind / PICTURE).exists()
        assert "| `model.layers.2.self_attn` | skipped |" in text


def test_while_the_search_goes_on(tmp_path):
    model = make_eas("llama", "cpu", [], skipped_modules=None, num_skip=2)
    model.set_skipped_modules(mha_names("llama", [1, 3]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "The search was not over when this was saved" in text
    assert "| `model.layers.3.self_attn` | skipped |" in text


def test_an_adapter_with_another_name_and_modules_to_save(tmp_path):
    model = make_eas("bert", "cpu", SKIPS["half"], modules_to_save=["classifier"])
    trainable = model.get_nb_trainable_parameters()[0]
    model.add_adapter("second", model.peft_config["default"].__class__(skipped_modules=mha_names("bert", [1]), r=4))
    model.save_pretrained(tmp_path)
    assert rows(ModelCard.load(tmp_path / "README.md"))["Trainable parameters"].startswith(f"{trainable:,} ")
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    facts = rows(ModelCard.load(tmp_path / "README.md"))
    assert facts["Attentions skipped"] == "1 of 4"
    assert facts["Rank"].startswith("4 for")


def test_a_second_merge_keeps_the_origin_of_the_first(saved, tmp_path):
    if saved.family != "llama":
        pytest.skip("the same for every family")
    first = auto_class("llama").from_pretrained(saved.folder / "merged")
    second = add_eas(first, "llama", [1], "running").merge_and_unload()
    second.save_pretrained(tmp_path)
    facts = rows(ModelCard.load(tmp_path / "README.md"))
    assert facts["Base model"] == "`base`"
    assert facts["License of the base"] == "apache-2.0"
    assert facts["Attentions deleted"] == "3 of 4"
    assert "Speed" not in ModelCard.load(tmp_path / "README.md").text


def test_a_second_merge_counts_what_the_first_kept(tmp_path):
    first, third = mha_names("llama", [0]), mha_names("llama", [2])
    merged = add_eas(build_model("llama", "cpu"), "llama", [0], "running", kept_modules=third).merge_and_unload()
    assert merged.config.eas["origin"]["kept"] == third
    twice = add_eas(merged, "llama", [2], "running").merge_and_unload()
    facts = twice.config.eas["origin"]
    assert (facts["kept"], sorted(facts["candidates"])) == ([], mha_names("llama"))
    twice.save_pretrained(tmp_path)
    assert rows(ModelCard.load(tmp_path / "README.md"))["Attentions deleted"] == "2 of 4"
    merged = add_eas(build_model("llama", "cpu"), "llama", [0], "running").merge_and_unload()
    facts = add_eas(merged, "llama", [1], "running", kept_modules=third).merge_and_unload().config.eas["origin"]
    assert set(first + third) <= set(facts["candidates"])
    assert not set(facts["candidates"]) & set(facts["kept"])


def test_only_the_main_process_writes(llama, tmp_path):
    llama.save_pretrained(tmp_path / "adapter", is_main_process=False)
    llama.merge_and_unload().save_pretrained(tmp_path / "merged", is_main_process=False)
    assert not list(tmp_path.rglob("README.md"))


# --- speed -----------------------------------------------------------------------------------------------------------


def test_speeds_are_kept_and_measured_anew(llama, tmp_path):
    merged = llama.merge_and_unload()
    record_speed(merged, device="NVIDIA H100", prefill=1.2, decode=1.4)
    record_speed(merged, device="NVIDIA H100", decode=1.6)
    record_speed(merged, device="NVIDIA H100", prefill=1.1, against="the unmerged model")
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.eas["speed"] == [
        {"device": "NVIDIA H100", "against": "the base model", "conditions": "", "prefill": None, "decode": 1.6},
        {"device": "NVIDIA H100", "against": "the unmerged model", "conditions": "", "prefill": 1.1, "decode": None},
    ]
    assert "| NVIDIA H100 |  | 1.60× | the base model |  |" in (tmp_path / "README.md").read_text()


def test_bad_speeds(llama):
    with pytest.raises(TypeError, match=r"record_speed was given a PeftModelForCausalLM.*merge_and_unload"):
        record_speed(llama, device="cpu", prefill=1.0)
    merged = llama.merge_and_unload()
    with pytest.raises(ValueError, match=r"neither prefill nor decode.*at least one"):
        record_speed(merged, device="cpu")
    for value in (0, -1.0, float("nan"), float("inf"), "1.5"):
        with pytest.raises(ValueError, match=r"record_speed\(decode=.*\): decode must be a finite number above 0"):
            record_speed(merged, device="cpu", decode=value)
    assert "speed" not in merged.config.eas


def test_saving_warns_of_nothing(llama, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        llama.save_pretrained(tmp_path / "adapter")
        llama.merge_and_unload().save_pretrained(tmp_path / "merged")
