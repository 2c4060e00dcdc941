"""ScienceQA for LaVIN: reading, prompts, the table, batches, and the whole command, also when it is interrupted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from scienceqa_data import byte_tokenizer, problem, write_data, write_image, write_llm, write_many
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.lavin.batches import AnswerCollator, order_by_length
from examples.lavin.samples import IGNORE, LavinCollator
from examples.scienceqa import __main__ as lavin_scienceqa
from examples.scienceqa.answering import generate_texts, num_tokens, rank_letters
from examples.scienceqa.data import INPUTS, OUTPUTS, ScienceQADataset, read_problems, write_prompt
from examples.scienceqa.scores import accuracies, accuracy_rows, chance, count, parse_letter
from examples.scienceqa.task import load_lavin, make_task, split_problems
from examples.shared.stages import Stages
from peft_eas import EASConfig

# One with everything: hint, image with caption, and an explanation of two lines.
FULL = {
    "1": problem(
        question="Which one  floats?",  # two spaces, which become one
        choices=["a stone", "a cork", "an anvil"],
        hint="They lie in water.",
        image="image.png",
        lecture="Light things float.\nHeavy things sink.",
        solution="A cork is light.",
    )
}
QUESTION = "Question: Which one floats?\n"
CONTEXT = "Context: They lie in water. Three things in a tub.\n"
OPTIONS = "Options: (A) a stone (B) a cork (C) an anvil\n"
L, E = "Light things float.\\nHeavy things sink.", "A cork is light."


@pytest.fixture
def full(tmp_path: Path):
    """The problem `FULL`, read from its files."""
    write_data(tmp_path / "full", FULL, {"1": "Three things in a tub."})
    return read_problems(tmp_path / "full", "train")[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, `data`, and a tiny language model, `llm`."""
    folder = tmp_path_factory.mktemp("scienceqa")
    write_many(folder / "data")
    write_llm(folder / "llm")
    return folder


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_format", "expected"),
    [
        ("CQM-A", f"{CONTEXT}{QUESTION}{OPTIONS}Answer: The answer is B."),
        ("QCM-A", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: The answer is B."),
        ("QCML-A", f"{QUESTION}{CONTEXT}{OPTIONS}BECAUSE: {L}\nAnswer: The answer is B."),
        ("QCME-A", f"{QUESTION}{CONTEXT}{OPTIONS}BECAUSE: {E}\nAnswer: The answer is B."),
        ("QCMLE-A", f"{QUESTION}{CONTEXT}{OPTIONS}BECAUSE: {L} {E}\nAnswer: The answer is B."),
        ("QCLM-A", f"{QUESTION}{CONTEXT}BECAUSE: {L}\n{OPTIONS}Answer: The answer is B."),
        ("QCEM-A", f"{QUESTION}{CONTEXT}BECAUSE: {E}\n{OPTIONS}Answer: The answer is B."),
        ("QCLEM-A", f"{QUESTION}{CONTEXT}BECAUSE: {L} {E}\n{OPTIONS}Answer: The answer is B."),
        # As officially, AL and AE take the other of lecture and explanation.
        ("QCM-AL", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: The answer is B. BECAUSE: {E}"),
        ("QCM-AE", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: The answer is B. BECAUSE: {L}"),
        ("QCM-ALE", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: The answer is B. BECAUSE: {L} {E}"),
        ("QCM-AEL", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: The answer is B. BECAUSE: {E} {L}"),
        ("QCM-LA", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: {L} The answer is B."),
        ("QCM-EA", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: {E} The answer is B."),
        ("QCM-LEA", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: {L} {E} The answer is B."),
        ("QCM-ELA", f"{QUESTION}{CONTEXT}{OPTIONS}Answer: {E} {L} The answer is B."),
    ],
)
def test_official_formats(full, prompt_format: str, expected: str) -> None:
    prompt, answer = write_prompt(full, prompt_format, use_caption=True)
    assert prompt + answer == expected
    assert prompt.endswith("Answer:")
    tested = {name for case in test_official_formats.pytestmark[0].args[1] for name in case[0].split("-")}
    assert tested == {*INPUTS, *OUTPUTS}


def test_lavin_wording(full) -> None:
    prompt, answer = write_prompt(full, "QCM-ALE", use_caption=True, wording="lavin")
    assert prompt == f"{QUESTION}{CONTEXT}{OPTIONS}Response:"
    assert answer == f"The answer is B. BECAUSE: {L} {E}"


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    write_data(tmp_path, {"1": problem(lecture="", solution="")}, {})
    bare = read_problems(tmp_path, "train")[0]
    prompt, answer = write_prompt(bare, "QCM-ALE", use_caption=True)
    assert prompt == (
        "Question: Which of these floats?\nContext: N/A\nOptions: (A) a stone (B) a cork\nAnswer:"
    )  # fmt: skip
    assert answer == " The answer is B."
    assert write_prompt(bare, "QCM-LEA")[1] == " The answer is B."


@pytest.mark.parametrize("prompt_format", ["QCM", "QCM-", "QMC-A", "QCM-AX", "qcm-a", "QCM-A-L", ""])
def test_unknown_format(full, prompt_format: str) -> None:
    with pytest.raises(ValueError, match=rf"The format '{prompt_format}' is unknown.*QCM-ALE.*CQM, QCM.*AEL"):
        write_prompt(full, prompt_format)


def test_unknown_wording(full) -> None:
    with pytest.raises(ValueError, match="wording='vicuna' must be one of: scienceqa, lavin"):
        write_prompt(full, "QCM-A", wording="vicuna")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_splits_and_captions(files: Path) -> None:
    assert [len(read_problems(files / "data", split)) for split in ("train", "val", "test", "trainval")] == [
        *(24, 8, 8, 32)
    ]
    test = read_problems(files / "data", "test")
    assert [p.id for p in test] == [str(132 + i) for i in range(8)]
    assert test[1].image == files / "data" / "images" / "test" / "133" / "image.png"
    assert test[0].image is None
    assert [bool(p.caption) for p in test] == [False, True] * 4
    assert [p.grade for p in test] == [9, 10, 11, 12, 1, 2, 3, 4]


def test_captions_beside_the_folder(tmp_path: Path) -> None:
    write_data(tmp_path / "data", FULL, {"1": "Three things in a tub."})
    (tmp_path / "data" / "captions.json").rename(tmp_path / "captions.json")
    assert read_problems(tmp_path / "data", "train")[0].caption == "Three things in a tub."


@pytest.mark.parametrize("name", ["problems", "pid_splits", "captions"])
def test_missing_and_broken_files(tmp_path: Path, name: str) -> None:
    write_data(tmp_path, FULL, {})
    file = tmp_path / f"{name}.json"
    file.write_text("{cut off", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}.json cannot be read as JSON .* Copy or download it again"):
        read_problems(tmp_path, "train")
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}.json holds a list, not a dictionary"):
        read_problems(tmp_path, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.json is missing. Give a folder in .* official layout"):
        read_problems(tmp_path, "train")


def test_unknown_split_and_problem(tmp_path: Path) -> None:
    write_data(tmp_path, FULL, {})
    with pytest.raises(ValueError, match=r"no problems in a split 'minival'\. Its splits are: train, trainval"):
        read_problems(tmp_path, "minival")
    with pytest.raises(ValueError, match="no problems in a split 'test'"):
        read_problems(tmp_path, "test")
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "7"]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"puts problem '7' into 'train', but problems.json .* \(1 are missing\)"):
        read_problems(tmp_path, "train")


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("question", "", "a text that is not empty"),
        ("choices", ["one"], "a list of 2 to 5 texts"),
        ("choices", ["a", "b", "c", "d", "e", "f"], "a list of 2 to 5 texts"),
        ("answer", 2, r"in \[0, 1\]"),
        ("answer", "1", r"in \[0, 1\]"),
        ("hint", None, "a text"),
        ("image", "", "a file name or null"),
        ("lecture", 3, "a text"),
        ("solution", None, "a text"),
        ("subject", "maths", "one of natural science, social science, language science"),
        ("grade", "grade13", "from grade1 to grade12"),
        ("split", None, "the split's name"),
    ],
)
def test_broken_problem(tmp_path: Path, field: str, value: object, must: str) -> None:
    folder = write_data(tmp_path, {"7": problem()}, {})
    content = json.loads((folder / "problems.json").read_text())
    content["7"][field] = value
    (folder / "problems.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"Problem '7' of .* is broken: its {field} is .*, but must be {must}"):
        read_problems(folder, "train")


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_and_captions(tmp_path: Path) -> None:
    fields = {"image": "image.png", "split": "test"}
    write_data(tmp_path, {"1": problem(**fields), "2": problem(**fields), "3": problem(split="test")}, {"1": "A tub.", "2": "A sea."})  # fmt: skip # noqa: E501
    write_image(tmp_path / "images" / "test" / "1")
    problems = read_problems(tmp_path, "test")

    def contexts(**options) -> list[str]:
        data = ScienceQADataset(problems, "QCM-A", **options)
        assert [data[i].image is not None for i in range(3)] == data.shown
        return [data[i].prompt.split("Context: ")[1].split("\n")[0] for i in range(3)]

    assert contexts() == ["N/A", "A sea.", "N/A"]  # the second's image is missing: its caption instead
    assert contexts(captions="always") == ["A tub.", "A sea.", "N/A"]
    assert contexts(captions="never") == ["N/A", "N/A", "N/A"]
    assert contexts(images="none") == ["A tub.", "A sea.", "N/A"]
    data = ScienceQADataset(problems)
    assert data.shown == [True, False, False]
    assert data[0].image.size == (12, 10)
    assert data.describe_images() == "3 problems, 2 of which name an image, 1 of which are shown it"
    with pytest.raises(FileNotFoundError, match=r"2.image.png is missing, and so are 0 more .* images=\"available\""):
        ScienceQADataset(problems, images="required")
    with pytest.raises(ValueError, match="images='all' must be one of: available, required, none"):
        ScienceQADataset(problems, images="all")
    with pytest.raises(ValueError, match="captions='no' must be one of: instead, always, never"):
        ScienceQADataset(problems, captions="no")


# --- letters and table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (" The answer is B. BECAUSE: (A) is heavy.", 1),
        ("It is light. The answer is C.", 2),
        ("The answer is A. The answer is B.", 0),  # the first, as in LaVIN's evaluation
        ("The answer is D.", None),  # there is no such choice
        ("The answer is Z. Or (B).", None),
        ("the answer is (b)", 1),
        ("I would say (C), the anvil.", 2),
        ("B", 1),
        (" B. a cork", 1),
        ("A cork floats.", 1),  # "A" is an article; the choice's words tell
        ("The answer is A cork", 1),
        ("The answer is B because (A) is heavy.", 1),
        ("The answer is B because it floats", 1),
        ("a cork or an anvil", None),
        ("An apple", None),
        ("", None),
    ],
)
def test_parse_letter(full, text: str, index: int | None) -> None:
    assert parse_letter(text, full) == index


def test_table_of_hand_counted_examples(tmp_path: Path) -> None:
    image = {"image": "image.png"}
    rows = [
        problem(subject="natural science", grade="grade1", hint="h", **image),  # TXT and IMG
        problem(subject="natural science", grade="grade6", hint="h"),
        problem(subject="natural science", grade="grade7", **image, choices=["a", "b", "c", "d"]),
        problem(subject="social science", grade="grade12"),
        problem(subject="language science", grade="grade3", answer=0),
    ]
    write_data(tmp_path, {str(i): row for i, row in enumerate(rows)}, {})
    problems = read_problems(tmp_path, "train")
    # The right answers are 1, 1, 1, 1, 0; the first, third and last are right.
    shares = accuracies(problems, [1, 0, 1, None, 0])
    assert count(problems) == {
        "NAT": 3, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 2, "G1-6": 3, "G7-12": 2, "Avg": 5
    }  # fmt: skip
    assert shares == {
        "NAT": 2 / 3, "SOC": 0.0, "LAN": 1.0, "TXT": 0.5, "IMG": 1.0, "NO": 0.5,
        "G1-6": 2 / 3, "G7-12": 0.5, "Avg": 0.6,
    }  # fmt: skip
    assert accuracy_rows(problems, {"EAS": shares}) == [
        ["model", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"],
        ["problems", "3", "1", "1", "2", "2", "2", "3", "2", "5"],
        ["EAS", "66.67", "0.00", "100.00", "50.00", "100.00", "50.00", "66.67", "50.00", "60.00"],
    ]
    guessing = chance(problems)
    assert guessing["IMG"] == (1 / 2 + 1 / 4) / 2
    assert guessing["Avg"] == pytest.approx((4 / 2 + 1 / 4) / 5)
    only_social = accuracies(problems[3:4], [1])
    assert only_social["NAT"] is None
    assert accuracy_rows(problems[3:4], {"m": only_social})[2][:3] == ["m", "–", "100.00"]
    with pytest.raises(ValueError, match="There are 1 answers to 5 problems"):
        accuracies(problems, [0])


# --- batches ---------------------------------------------------------------------------------------------------------


def test_order_by_length() -> None:
    lengths = [(37 * i) % 101 for i in range(101)]  # each length once
    order = order_by_length(lengths, 5, 60)
    assert len(order) == 300
    # Of 80 sorted together, the first 80 are one epoch's; 300 hold two whole epochs of 101.
    assert len(set(order[:80])) == 80
    assert min(order.count(i) for i in range(101)) >= 2
    widths = [max(part) - min(part) for part in ([lengths[i] for i in order[s : s + 5]] for s in range(0, 80, 5))]
    assert max(widths) < 30
    assert order == order_by_length(lengths, 5, 60) != order_by_length(lengths, 5, 60, seed=1)
    assert sorted(order_by_length([3, 1], 4, 1)) == [0, 0, 1, 1]


def test_labels_are_on_the_answers_alone(files: Path) -> None:
    model, processor = load_lavin(llm=str(files / "llm"))
    data = ScienceQADataset(read_problems(files / "data", "train"), "QCM-ALE", images="none")
    samples = [data[0], data[1], data[2]]
    batch = AnswerCollator(processor)(samples)
    tokenizer = processor.tokenizer
    for row, labels, mask, sample in zip(batch["input_ids"], batch["labels"], batch["eas_prompt_mask"], samples):
        assert tokenizer.decode(labels[labels != IGNORE]) == f"{sample.answer}</s>"
        prompt = tokenizer.decode(row[mask], skip_special_tokens=True)
        assert prompt == f"Image: N/A\n{sample.prompt}"
    full = LavinCollator(processor)(samples)
    with torch.no_grad():
        assert batch["labels"].shape[1] == batch["logits_to_keep"] < full["labels"].shape[1]
        kept = {name: value for name, value in batch.items() if name != "eas_prompt_mask"}
        assert model(**kept).loss.item() == pytest.approx(model(**full).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("wording", "gap"), [("scienceqa", " "), ("lavin", "")])
def test_prompt_and_answer_are_read_as_one_text(files: Path, wording: str, gap: str) -> None:
    _, processor = load_lavin(llm=str(files / "llm"))
    data = ScienceQADataset(read_problems(files / "data", "test"), "QCM-A", images="none", wording=wording)
    assert {answer[: answer.index("The")] for _, answer in data.texts} == {gap}
    end = processor.tokenizer.eos_token_id
    for sample, number in zip(data, num_tokens(data, processor)):
        batch = LavinCollator(processor)([sample])
        assert batch["input_ids"][0].tolist() == [*processor.encode(sample.prompt + sample.answer, False), end]
        assert batch["input_ids"].shape[1] == number


def test_answers_do_not_depend_on_the_batch(files: Path, tmp_path: Path) -> None:
    model, processor = load_lavin(llm=str(files / "llm"))
    data = ScienceQADataset(read_problems(files / "data", "test"), "QCM-A", images="none")
    texts = generate_texts(model, data, processor, None, batch_size=3, max_new_tokens=6)
    assert texts == generate_texts(model, data, processor, None, batch_size=1, max_new_tokens=6)
    assert rank_letters(model, data, processor, 3) == rank_letters(model, data, processor, 1)

    # What was written before is not generated again; a line that was cut off is.
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps([data.problems[0].id, "said before"]) + f'\n["{data.problems[1].id}", "cut o')
    again = generate_texts(model, data, processor, file, batch_size=3, max_new_tokens=6)
    assert again == ["said before", *texts[1:]]
    assert generate_texts(None, data, processor, file) == again


SETTINGS = {"prompt_format": "QCM-A", "steps": 5, "batch_size": 4, "learning_rate": 1e-3, "max_length": 512}


def test_reward_problems_are_not_trained_on(files: Path) -> None:
    parts = split_problems(files / "data", "trainval", 4)
    ids = {name: {p.id for p in own} for name, own in parts.items()}
    assert [len(ids[name]) for name in ("train", "reward", "test")] == [28, 4, 8]
    assert len(set.union(*ids.values())) == 40
    assert ids["reward"] == {"124", "126", "128", "130"}
    processor = load_lavin(llm=str(files / "llm"))[1]
    loading = {"llm": str(files / "llm")}
    task = make_task(parts, loading, processor, **SETTINGS)
    assert len(task.train) == 20
    assert set(task.score(task.load_base())) == {"Avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"}
    with pytest.raises(SystemExit, match="--max-length 20: no problem for 'train' is as short as that; the shortest"):
        make_task(parts, loading, processor, **{**SETTINGS, "max_length": 20})


def test_images_are_shown_to_a_vision_tower(files: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(tmp_path)
    loading = {"llm": str(files / "llm"), "vision": str(tmp_path), "dtype": torch.bfloat16}
    model, processor = load_lavin(**loading)
    task = make_task(split_problems(files / "data", "train", 4), loading, processor, **SETTINGS)
    assert task.test.shown == [False, True] * 4
    assert "dots" not in task.test[1].prompt  # the image is there, so its caption is not
    assert "dots" in task.train.dataset.dataset[1].prompt
    assert task.collate([task.test[i] for i in range(4)])["pixel_values"].shape == (2, 3, 8, 8)
    eas = get_peft_model(model, EASConfig(**task.eas, num_skip=2))
    assert eas.base_model.candidates == [f"model.language_model.layers.{i}.self_attn" for i in range(4)]
    assert len(task.score(eas)) == 9


def test_byte_tokenizer() -> None:
    assert byte_tokenizer().decode(byte_tokenizer()("Wörter")["input_ids"]) == "Wörter"


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_goes_on_after_an_interruption(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def start(out: Path, *options: str) -> lavin_scienceqa.Run:
        arguments = ["--data", files / "data", "--llm", files / "llm", "--output-dir", out, "--quick", "--steps", 8]
        arguments += ["--minutes", 600, "--reward-problems", 4, "--batch-size", 4, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["scienceqa", *map(str, arguments)])
        return lavin_scienceqa.Run(lavin_scienceqa.parse_arguments())

    trained, interruptions = [], [("eas", 5)]
    step = Trainer.training_step

    def training_step(trainer: Trainer, *args, **kwargs):
        trained.append((Path(trainer.args.output_dir).name, trainer.state.global_step))
        if trained[-1] in interruptions:
            interruptions.clear()
            raise RuntimeError("the power fails")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="the power fails"):
        start(tmp_path / "out").all_stages()
    assert trained == [*(("adapters", i) for i in range(8)), *(("eas", i) for i in range(6))]
    printed = capsys.readouterr().out
    assert "steps in 600.0 minutes" in printed

    trained.clear()
    start(tmp_path / "out")  # as main() does
    lavin_scienceqa.main()
    assert trained == [("eas", i) for i in range(4, 8)]  # from the last checkpoint on
    printed = capsys.readouterr().out
    assert "adapters: done before" in printed
    assert "every sample is text only" in printed
    assert "2 of 4 attentions are to be skipped; 8 steps" in printed

    # The same as without an interruption.
    whole = start(tmp_path / "whole").tuned("eas", 2)
    again = load_file(tmp_path / "out" / "eas" / "adapter" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(whole)
    assert set(again) == set(expected)
    assert all(torch.equal(again[name], value) for name, value in expected.items())

    text = (tmp_path / "out" / "report.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert text in printed
    assert report["merge"]["skipped"] == whole.base_model.skipped_modules
    assert report["merge"]["logits_difference"] < 1e-5 * report["merge"]["largest_logit"]
    assert report["merged"]["answers"] == report["eas"]["answers"]
    assert report["merged"]["ranked"] == report["eas"]["ranked"]
    # 4 layers of float32 keys and values of 2 heads of 8 channels, of which 2 are skipped
    assert report["speed"]["cache_bytes_per_token"] == {"base": 512.0, "unmerged": 256.0, "merged": 256.0}
    assert report["speed"]["parameters"]["merged"] < report["speed"]["parameters"]["base"]
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| problems")] == ["8", "8"]
    for name in ("skip_map.png", "search_curve.png", "merged/model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 0

    with pytest.raises(SystemExit, match=r"holds the stages of a run with learning_rate=0.001; this one has 0.01"):
        start(tmp_path / "out", "--learning-rate", "0.01")


def test_stages(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {"a": 1})
    assert stages.run("one", lambda: {"x": [1, None]}) == {"x": [1, None]}
    with pytest.raises(KeyError):
        stages.run("two", lambda: {}["x"])
    with (tmp_path / "stages.jsonl").open("a") as file:
        file.write('\n{"stage": "three", "figures": {"cut o')
    again = Stages(tmp_path, {"a": 1})
    assert again.run("one", lambda: pytest.fail("it is done")) == {"x": [1, None]}
    assert again.run("two", lambda: 2) == 2
    assert Stages(tmp_path, {"a": 1}).done == {"settings": {"a": 1}, "one": {"x": [1, None]}, "two": 2}
    with pytest.raises(SystemExit, match=r"a=1; this one has None \(2 settings differ\). Give the same settings"):
        Stages(tmp_path, {"b": 1})
