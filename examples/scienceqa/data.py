"""ScienceQA (Lu et al., NeurIPS 2022): its problems as they are published, and its prompts in the official formats.

The official layout (https://github.com/lupantech/ScienceQA) is a folder with `problems.json`, `pid_splits.json`,
`captions.json` and `images/SPLIT/ID/image.png`. The data's licence is CC BY-NC-SA 4.0.

A format is named INPUT-OUTPUT. The input is a problem's parts in order: Q question, C context (its hint, then its
caption), M multiple options, L lecture, E explanation; the last two only in the upper bounds, behind "BECAUSE:". The
output is the answer A with the lecture and the explanation behind or in front of it. QCM-A and QCM-ALE, the paper's:

    Question: Which one is a mammal?
    Context: N/A
    Options: (A) trout (B) bat
    Answer: The answer is B. BECAUSE: Mammals feed their young milk. A bat does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset

from examples.lavin.samples import Sample

LETTERS = "ABCDE"
SUBJECTS = ("natural science", "social science", "language science")
GRADES = tuple(f"grade{number}" for number in range(1, 13))

INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {options}\n",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {options}\n",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {options}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {options}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {options}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {options}\n",
}
OUTPUTS = {
    "A": "The answer is {letter}.",
    # Of L and E alone behind the answer, the official prompts take the other.
    "AL": "The answer is {letter}. BECAUSE: {solution}",
    "AE": "The answer is {letter}. BECAUSE: {lecture}",
    "ALE": "The answer is {letter}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {letter}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {letter}.",
    "EA": "{solution} The answer is {letter}.",
    "LEA": "{lecture} {solution} The answer is {letter}.",
    "ELA": "{solution} {lecture} The answer is {letter}.",
}
# What ends the prompt, and what lies between it and the answer, in ScienceQA's own prompts and in LaVIN's.
WORDINGS = {"scienceqa": ("Answer:", " "), "lavin": ("Response:", "")}

Wording = Literal["scienceqa", "lavin"]


@dataclass(frozen=True)
class Problem:
    """One multiple-choice question.

    Attributes:
        answer: index of the right one of `choices`.
        image: where the image lies that the problem names, whether it is there or not; None if it names none.
        caption: of the image; empty if there is none.
        grade: of school, from 1 to 12.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: Path | None
    caption: str
    lecture: str
    solution: str
    subject: str
    grade: int

    @property
    def letter(self) -> str:
        """The right answer's."""
        return LETTERS[self.answer]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_problems(folder: Path, split: str) -> list[Problem]:
    """The problems of one split, in its order.

    Args:
        folder: the official layout; `captions.json` may lie beside the folder as well, as it does officially.
        split: one that `pid_splits.json` knows, such as "train", "val", "test" or "trainval".

    Raises:
        FileNotFoundError: for a file that is missing.
        ValueError: for a file that is not JSON, an unknown split and a problem that is broken.
    """
    folder = Path(folder)
    problems, splits = _read_json(folder / "problems.json"), _read_json(folder / "pid_splits.json")
    if not splits.get(split):
        known = ", ".join(name for name, ids in splits.items() if ids)
        raise ValueError(f"{folder} has no problems in a split {split!r}. Its splits are: {known}.")
    missing = [number for number in splits[split] if number not in problems]
    if missing:
        raise ValueError(
            f"pid_splits.json puts problem {missing[0]!r} into {split!r}, but problems.json in {folder} has no such "
            f"problem ({len(missing)} are missing). Take both files from one copy of the data."
        )
    own, beside = folder / "captions.json", folder.parent / "captions.json"
    captions = _read_json(beside if beside.is_file() and not own.is_file() else own).get("captions", {})
    return [_problem(number, problems[number], folder, captions.get(number, "")) for number in splits[split]]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Give a folder in ScienceQA's official layout: problems.json, pid_splits.json, "
            "captions.json and images/SPLIT/ID/image.png."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary. Copy or download it again.")
    return content


def _problem(number: str, fields: dict[str, Any], folder: Path, caption: str) -> Problem:
    def require(name: str, check: Callable[[Any], bool], what: str) -> Any:
        value = fields.get(name)
        if not check(value):
            raise ValueError(
                f"Problem {number!r} of {folder / 'problems.json'} is broken: its {name} is {value!r}, but must be "
                f"{what}. Mend it, or take its number out of pid_splits.json."
            )
        return value

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    def are_choices(value: Any) -> bool:
        return isinstance(value, list) and 2 <= len(value) <= len(LETTERS) and all(map(is_text, value))

    choices = require("choices", are_choices, f"a list of 2 to {len(LETTERS)} texts")
    indices = range(len(choices))
    image = require("image", lambda value: value is None or bool(value and is_text(value)), "a file name or null")
    split = require("split", lambda value: bool(value and is_text(value)), "the split's name")
    return Problem(
        id=number,
        question=require("question", lambda value: bool(value and is_text(value)), "a text that is not empty"),
        choices=tuple(choices),
        answer=require("answer", lambda value: type(value) is int and value in indices, f"in {list(indices)}"),
        hint=require("hint", is_text, "a text"),
        image=None if image is None else folder / "images" / split / number / image,
        caption=caption,
        lecture=require("lecture", is_text, "a text"),
        solution=require("solution", is_text, "a text"),
        subject=require("subject", SUBJECTS.__contains__, f"one of {', '.join(SUBJECTS)}"),
        grade=GRADES.index(require("grade", GRADES.__contains__, "from grade1 to grade12")) + 1,
    )


# --- prompts ---------------------------------------------------------------------------------------------------------


def write_prompt(
    problem: Problem, prompt_format: str, use_caption: bool = False, wording: Wording = "scienceqa"
) -> tuple[str, str]:
    """Prompt and answer; the official text is one behind the other.

    Line breaks inside lectures and explanations are written as backslash and n, two spaces as one, and a "BECAUSE:"
    with nothing behind it is left out, as officially.

    Args:
        prompt_format: INPUT-OUTPUT, with one of `INPUTS` and one of `OUTPUTS`.
        use_caption: put the image's caption into the context.
        wording: "scienceqa": "Answer:" ends the prompt and a space begins the answer; "lavin": "Response:" ends it,
            as in the prompts of LaVIN's released weights, and the answer begins at once.

    Raises:
        ValueError: for an unknown format or wording.
    """
    start, output = _templates(prompt_format)
    if wording not in WORDINGS:
        raise ValueError(f"wording={wording!r} must be one of: {', '.join(WORDINGS)}.")
    head, gap = WORDINGS[wording]
    context = f"{problem.hint} {problem.caption if use_caption else ''}".strip()
    parts = {
        "question": problem.question,
        "context": context or "N/A",
        "options": " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices)),
        "lecture": problem.lecture.replace("\n", "\\n"),
        "solution": problem.solution.replace("\n", "\\n"),
        "letter": problem.letter,
    }
    prompt = (start.format(**parts) + head).replace("  ", " ").strip()
    answer = output.format(**parts).replace("  ", " ").strip().removesuffix("BECAUSE:").strip()
    return prompt, gap + answer


def _templates(prompt_format: str) -> tuple[str, str]:
    start, _, output = prompt_format.partition("-")
    if start not in INPUTS or output not in OUTPUTS:
        raise ValueError(
            f"The format {prompt_format!r} is unknown. It is INPUT-OUTPUT, such as QCM-A or QCM-ALE, with an input of "
            f"{', '.join(INPUTS)} and an output of {', '.join(OUTPUTS)}."
        )
    return INPUTS[start], OUTPUTS[output]


class ScienceQADataset(Dataset):
    """Problems as `Sample`s, for `LavinCollator`.

    Args:
        problems: from `read_problems`.
        prompt_format, wording: as in `write_prompt`.
        images: "available": each image that is there; a problem whose image is missing is treated as text only.
            "required": a missing image is an error. "none": no image, every sample is text only.
        captions: "instead": in the context of a problem that names an image which is not shown. "always": in the
            context of every problem with an image. "never".

    Raises:
        FileNotFoundError: with `images="required"`, for an image that is missing.
        ValueError: for an argument that is unknown.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        prompt_format: str = "QCM-ALE",
        images: Literal["available", "required", "none"] = "available",
        captions: Literal["instead", "always", "never"] = "instead",
        wording: Wording = "scienceqa",
    ) -> None:
        for name, value, allowed in (
            ("images", images, ("available", "required", "none")),
            ("captions", captions, ("instead", "always", "never")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of: {', '.join(allowed)}.")
        self.problems = list(problems)
        self.shown = [images != "none" and p.image is not None and p.image.is_file() for p in self.problems]
        missing = [p.image for p, is_shown in zip(self.problems, self.shown) if p.image is not None and not is_shown]
        if images == "required" and missing:
            raise FileNotFoundError(
                f"{missing[0]} is missing, and so are {len(missing) - 1} more images. Download them, or set "
                'images="available" to go on with captions or text alone.'
            )
        self.texts = [
            write_prompt(p, prompt_format, captions == "always" or (captions == "instead" and not is_shown), wording)
            for p, is_shown in zip(self.problems, self.shown)
        ]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Sample:
        image = None
        if self.shown[index]:
            with Image.open(self.problems[index].image) as file:
                image = file.convert("RGB")
        prompt, answer = self.texts[index]
        return Sample(prompt, answer, image)

    def describe_images(self) -> str:
        """How many problems name an image, and how many are shown it."""
        named = sum(problem.image is not None for problem in self.problems)
        return f"{len(self)} problems, {named} of which name an image, {sum(self.shown)} of which are shown it"
