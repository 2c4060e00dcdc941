"""The command line does what the library does, tells refusals in one sentence, and ends with the right exit code."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from conftest import add_eas, build_model, difference, logits, make_inputs, mha_names
from peft import LoraConfig, get_peft_model
from processes import run_alone
from tokenizers import Tokenizer, models
from training import SCHEDULE, make_model, make_trainer
from transformers import PreTrainedTokenizerFast

from peft_eas import EASCallback, EASConfig, eas_summary
from peft_eas.cli import main

ROOT = Path(__file__).parents[1]
OLD_SEARCH = Path(__file__).parent / "old_artefacts" / "eas_search.json"
AUTO = {
    "llama": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "llava": "AutoModelForImageTextToText",
}
HEAD = {"vit": {"modules_to_save": ["classifier"]}}
SCORES = {name: 0.25 * (-1) ** i for i, name in enumerate(mha_names("llama"))}


def save_tokenizer(folder: Path, words: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class Saved:
    """The base and an adapter of a family, in folders, with what they must say."""

    def __init__(
        self,
        family: str,
        folder: Path,
        skip: tuple[int, ...] = (1, 3),
        num_labels: int | None = None,
        context: str = "running",
        model_class: str | None = None,
        **options: Any,
    ):
        self.family, self.base, self.adapter, self.out = family, folder / "base", folder / "adapter", folder / "out"
        self.auto_class = getattr(transformers, AUTO[family])
        build_model(family, model_class=model_class).save_pretrained(self.base)
        labels = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        base = self.auto_class.from_pretrained(self.base, **labels)
        model = add_eas(base, family, list(skip), context, **{**HEAD.get(family, {}), **options})
        if family == "llama":
            model.peft_config["default"].scores = SCORES
        self.inputs = make_inputs(family, "cpu")
        self.expected, self.summary = logits(model, self.inputs), str(eas_summary(model))
        model.save_pretrained(self.adapter)

    def merge(self, *options: str) -> int:
        return main(["merge", str(self.base), str(self.adapter), str(self.out), *options])

    def difference(self) -> float:
        return difference(logits(self.auto_class.from_pretrained(self.out), self.inputs), self.expected)


@pytest.fixture(params=AUTO)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    return Saved(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Saved:
    return Saved("llama", tmp_path)


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, which must be the only one about the error."""
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


# --- merge -----------------------------------------------------------------------------------------------------------


def test_merge_finds_the_class_and_says_what_the_adapter_says(saved, capsys):
    assert saved.merge("--safe-merge") == 0
    assert saved.difference() < 1e-5
    captured = capsys.readouterr()
    assert captured.out == f"{saved.out}\n"  # stdout holds the result alone
    assert "2 attentions are deleted" in captured.err
    deleted = json.loads((saved.out / "config.json").read_text())["eas"]["skipped"]
    assert len(deleted) == 2
    assert (saved.out / "modeling_eas.py").is_file()
    assert (saved.out / "README.md").is_file()


@pytest.mark.parametrize(
    ("family", "task_type", "auto_class"),
    [
        ("t5", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("whisper", "SEQ_2_SEQ_LM", "AutoModelForSpeechSeq2Seq"),
        ("qwen2_vl", "CAUSAL_LM", "AutoModelForImageTextToText"),
        ("xlm-roberta", "TOKEN_CLS", "AutoModelForTokenClassification"),
        ("bart", "FEATURE_EXTRACTION", "AutoModel"),
        ("vilt", None, "AutoModelForVisualQuestionAnswering"),
    ],
)
def test_the_task_type_or_the_class_trained_on_finds_the_class(family, task_type, auto_class, tmp_path):
    family, auto_class = families.ARCHITECTURES[family], getattr(transformers, auto_class)
    family.build().save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, EASConfig(task_type=task_type, num_skip=1, context="none"))
    model.base_model.fix_skipped_modules(model.base_model.candidates[-1:])
    expected = families.output(model.get_base_model().eval(), family.make_inputs())
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    merged = auto_class.from_pretrained(tmp_path / "out").eval()
    assert difference(families.output(merged, family.make_inputs()), expected) < 1e-5


def test_merge_in_another_dtype(llama):
    assert llama.merge("--dtype", "bfloat16") == 0
    assert json.loads((llama.out / "config.json").read_text())["dtype"] == "bfloat16"
    assert llama.difference() < 0.1


def test_merge_keeps_the_adapters_for_each_prompt(tmp_path):
    saved = Saved("llama", tmp_path, context="prompt")
    assert saved.merge("--context", "prompt") == 0
    assert saved.difference() < 1e-5


def test_merge_takes_the_base_from_another_class_than_the_one_it_was_saved_from(tmp_path):
    """A masked language model tuned as a classifier with a head of seven classes."""
    changes = {"model_class": "BertForMaskedLM", "modules_to_save": ["classifier", "pooler"]}
    saved = Saved("bert", tmp_path, num_labels=7, **changes)
    assert saved.merge("--num-labels", "7") == 0
    assert saved.difference() < 1e-5


def test_a_head_of_another_size_is_told(tmp_path, capsys):
    saved = Saved("bert", tmp_path, num_labels=7)
    assert saved.merge() == 1
    assert re.search(r"does not fit .*classifier.*7.*--num-labels", sentence(capsys))
    assert not saved.out.exists()
    assert saved.merge("--num-labels", "7") == 0
    assert saved.difference() < 1e-5


def test_tokenizer_and_processor_files_go_along_the_adapters_over_the_bases(llama):
    save_tokenizer(llama.base, 50)
    (llama.base / "chat_template.jinja").write_text("base")
    (llama.base / "preprocessor_config.json").write_text("{}")
    save_tokenizer(llama.adapter, 61)
    (llama.adapter / "trainer_state.json").write_text("{}")
    (llama.adapter / "training_args.bin").write_text("")
    assert llama.merge() == 0
    assert len(transformers.AutoTokenizer.from_pretrained(llama.out)) == 61
    assert (llama.out / "chat_template.jinja").read_text() == "base"
    names = {path.name for path in llama.out.iterdir()}
    assert "preprocessor_config.json" in names
    assert not names & {"trainer_state.json", "training_args.bin", "adapter_config.json"}


def test_merge_makes_room_for_the_adapters_new_tokens(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    options = {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = add_eas(base, "llama", [1, 3], "running", **options)
    inputs = make_inputs("llama", "cpu")
    inputs["input_ids"][:, 3] = 69
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter", 70)
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(logits(merged, inputs), expected) < 1e-5


def test_merge_does_not_write_over_what_is_there(llama, capsys):
    before = {path: path.read_bytes() for path in llama.adapter.iterdir()}
    assert main(["merge", str(llama.base), str(llama.adapter), str(llama.adapter)]) == 1
    assert "is not empty. Name a folder that is empty or does not exist yet." in sentence(capsys)
    assert {path: path.read_bytes() for path in llama.adapter.iterdir()} == before


def test_what_is_no_eas_adapter_is_told(llama, capsys, tmp_path):
    get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    assert main(["merge", str(llama.base), str(tmp_path / "lora"), str(llama.out)]) == 1
    assert sentence(capsys).startswith("peft-eas merge: ")
    assert main(["merge", str(llama.base), str(tmp_path / "none"), str(llama.out)]) == 1
    assert f"{tmp_path / 'none'} is no folder" in sentence(capsys)
    assert main(["merge", str(tmp_path / "none"), str(llama.adapter), str(llama.out)]) == 1
    assert f"{tmp_path / 'none'} is no folder" in sentence(capsys)
    bert = Saved("bert", tmp_path / "other")
    assert main(["merge", str(bert.base), str(llama.adapter), str(llama.out)]) == 1
    assert "matches nothing in Bert" in sentence(capsys)
    assert not llama.out.exists()


# --- summary and card ------------------------------------------------------------------------------------------------


def test_summary_of_an_adapter_and_of_what_it_was_merged_into(saved, capsys):
    assert main(["summary", str(saved.adapter)]) == 0  # on the base that its config names
    assert capsys.readouterr().out == f"{saved.summary}\n"
    saved.merge()
    capsys.readouterr()
    assert main(["summary", str(saved.out), "--context-length", "16"]) == 0
    merged = saved.auto_class.from_pretrained(saved.out)
    assert capsys.readouterr().out == f"{eas_summary(merged, 16)}\n"


def test_summary_reads_no_weights_of_the_base(llama, capsys):
    (llama.base / "model.safetensors").unlink()
    assert main(["summary", str(llama.adapter)]) == 0
    assert capsys.readouterr().out == f"{llama.summary}\n"


def test_summary_on_a_base_that_was_moved(llama, capsys):
    moved = llama.base.rename(llama.base.with_name("moved"))
    assert main(["summary", str(llama.adapter)]) == 1
    assert str(llama.base) in sentence(capsys)
    assert main(["summary", str(llama.adapter), "--base", str(moved)]) == 0
    assert capsys.readouterr().out == f"{llama.summary}\n"


def test_summary_of_something_else(llama, capsys):
    for folder in (llama.base, llama.base.parent):
        assert main(["summary", str(folder)]) == 1
        assert "holds neither an EAS adapter nor a model that was merged with one" in sentence(capsys)
    assert main(["summary", str(llama.adapter), "--context-length", "0"]) == 1
    assert "context_length must be an integer of at least 1" in sentence(capsys)


@pytest.mark.parametrize("kind", ["adapter", "out"])
def test_card_is_written_again_as_it_was(saved, kind, capsys):
    saved.merge()
    capsys.readouterr()
    card = getattr(saved, kind) / "README.md"
    before = card.read_text()
    card.unlink()
    assert main(["card", str(card.parent)]) == 0
    assert capsys.readouterr().out == f"{card}\n"
    section = re.search(r"<!-- peft_eas.*<!-- peft_eas: end -->", before, re.DOTALL)[0]
    assert section in card.read_text()
    card.write_text(card.read_text() + "\nA word of my own.\n")
    assert main(["card", str(card.parent)]) == 0
    assert "A word of my own." in card.read_text()


def test_card_needs_a_folder(capsys):
    assert main(["card", "someone/model"]) == 1
    assert "someone/model is not a folder" in sentence(capsys)


# --- plot ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run that searched, with checkpoints and its adapter."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, EASCallback(**SCHEDULE), make_model(), save_strategy="steps", save_steps=10)
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize("source", [".", "eas_search.json", "checkpoint-20"])
def test_plot_draws_every_picture_that_there_is(run, source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run / source), "--output-dir", str(tmp_path)]) == 0
    pictures = [tmp_path / name for name in pictures_of(run)]
    assert capsys.readouterr().out.splitlines() == list(map(str, pictures))
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def pictures_of(run: Path) -> list[str]:
    has_curve = json.loads((run / "eas_search.json").read_text()).get("curve") is not None
    return ["skip_map.png", "search_curve.png", *(["loss_curve.png"] if has_curve else [])]


def test_plot_draws_a_curve_and_the_bandits_probabilities(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    record = json.loads((run / "eas_search.json").read_text())
    flat = {"num_skip": [0, 1, 2, 3, 4], "increase": [0.0, 0.1, 0.2, 0.3, 0.4], "deviation": [0.1] * 5}
    (tmp_path / "eas_search.json").write_text(json.dumps({**record, "curve": flat, "measured": []}))
    assert main(["plot", str(tmp_path)]) == 0
    names = ["skip_map.png", "search_curve.png", "loss_curve.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert main(["plot", str(run), "--output-dir", str(tmp_path), "--values", "probabilities"]) == 1
    assert "values='probabilities' is for the bandit" in sentence(capsys)
    shutil.copy(OLD_SEARCH, tmp_path / "eas_search.json")
    assert main(["plot", str(tmp_path), "--values", "probabilities"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names[:2]]


def test_plot_writes_beside_what_it_reads(run, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copy(run / "eas_search.json", tmp_path)
    assert main(["plot", str(tmp_path / "eas_search.json")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"eas_search.json", *pictures_of(run)}


@pytest.mark.parametrize("kind", ["adapter", "out"])
def test_plot_of_an_adapter_or_a_merged_model_gives_the_map(llama, kind, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    llama.merge()
    capsys.readouterr()
    seen = []
    draw = "peft_eas.reporting.plots.result.draw_skip_map"
    monkeypatch.setattr(draw, lambda *arguments, unit: seen.append((*arguments, unit)) or arguments[-1])
    assert main(["plot", str(getattr(llama, kind)), "--output-dir", str(tmp_path)]) == 0
    names = mha_names("llama")
    assert seen == [(names, [names[1], names[3]], SCORES, tmp_path / "skip_map.png", "score")]
    assert "No search curve" in capsys.readouterr().err


def test_plot_of_a_merged_model_gives_what_was_found(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    names = [f"model.layers.{i}.self_attn" for i in range(12)]
    curve = {"num_skip": [0, 1, 2], "increase": [0.0, 0.1, 0.2], "deviation": [0.1] * 3}
    origin = {"candidates": names, "scores": {name: -0.5 * i for i, name in enumerate(names)}}
    origin["search"] = {"strategy": "ThompsonSampling", "curve": curve}
    # As transformers writes it: in the order of the alphabet.
    text = json.dumps({"eas": {"skipped": names[:2], "origin": origin}}, sort_keys=True)
    (tmp_path / "config.json").write_text(text)
    seen = []
    draw = "peft_eas.reporting.plots.result.draw_skip_map"
    monkeypatch.setattr(draw, lambda *arguments, unit: seen.append((*arguments, unit)) or arguments[-1])
    assert main(["plot", str(tmp_path)]) == 0
    candidates, skipped, costs, _, unit = seen[0]
    assert (candidates, skipped, unit) == (names, names[:2], "log loss")
    assert [costs[name] for name in names[:3]] == pytest.approx([-0.25, 0.25, 0.75])
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "No search curve" in capsys.readouterr().err


def test_plot_of_what_was_never_searched(tmp_path, capsys):
    saved = Saved("bert", tmp_path)
    for path in (saved.adapter, saved.base, tmp_path / "none"):
        assert main(["plot", str(path)]) == 1
        assert f"{path} holds no result of a search" in sentence(capsys)


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decilm", "vllm"])
def test_export_to_decilm(name, llama, capsys):
    """By its name, and by the old one."""
    save_tokenizer(llama.base, 61)
    llama.merge()
    capsys.readouterr()
    target = llama.out.with_name("exported")
    assert main(["export", name, str(llama.out), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    blocks = json.loads((target / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False, True]
    assert (target / "tokenizer.json").is_file()
    assert main(["export", name, str(llama.adapter), str(target.with_name("two"))]) == 1
    assert "holds an adapter, not a merged model" in sentence(capsys)


def test_export_to_gguf_tells_what_it_cannot_export(llama, capsys):
    pytest.importorskip("gguf")
    save_tokenizer(llama.base, 61)  # no tokenizer that llama.cpp knows
    llama.merge()
    target = llama.out.with_name("model.gguf")
    assert main(["export", "gguf", str(llama.out), str(target), "--dtype", "f16"]) == 1
    assert sentence(capsys).startswith("peft-eas export: ")
    assert not target.exists()


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["melt"],
        ["merge", "base"],
        ["merge", "base", "adapter", "out", "--device", "quark"],
        ["merge", "base", "adapter", "out", "--dtype", "float64"],
        ["export", "onnx", "merged", "out"],
        ["export", "decilm", "merged", "out", "--dtype", "f16"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_wrong_usage_ends_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: peft-eas" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "summary", "plot", "export decilm", "export gguf", "card"])
def test_every_command_has_help_with_an_example_that_it_takes(command, capsys):
    from peft_eas.cli import _parser

    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    example = capsys.readouterr().out.partition("example:")[2].split()
    assert example[: 1 + len(command.split())] == ["peft-eas", *command.split()]
    _parser().parse_args(example[1:])


def test_as_a_module_with_exit_codes(llama, tmp_path):
    as_module = "import runpy; runpy.run_module('peft_eas', run_name='__main__')"
    assert run_alone(as_module, "merge", "base", "adapter", "out", folder=tmp_path) == "out\n"
    assert llama.difference() < 1e-5
    process = subprocess.run(
        [sys.executable, "-m", "peft_eas", "summary", "base"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("peft-eas summary: base holds neither")


def test_the_entry_point_names_the_function():
    from configparser import ConfigParser

    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert (name, function) == ("peft-eas", "main")
    assert importlib.util.find_spec(module) is not None
