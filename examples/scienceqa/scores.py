"""How answers to ScienceQA are read and counted: the letter of a generated text, and the paper's nine accuracies."""

import re
from collections.abc import Callable, Sequence

from examples.scienceqa.data import LETTERS, Problem

# The official classes: a problem with a hint and an image counts in TXT and in IMG, one with neither in NO.
COLUMNS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem.subject == "natural science",
    "SOC": lambda problem: problem.subject == "social science",
    "LAN": lambda problem: problem.subject == "language science",
    "TXT": lambda problem: bool(problem.hint),
    "IMG": lambda problem: problem.image is not None,
    "NO": lambda problem: not problem.hint and problem.image is None,
    "G1-6": lambda problem: problem.grade <= 6,
    "G7-12": lambda problem: problem.grade >= 7,
    "Avg": lambda problem: True,
}

_PATTERNS = (
    re.compile(r"The answer is ([A-Z])\."),  # the official one
    re.compile(r"[Aa]nswer is:? ((?:[AI]\b(?! [a-z])|[B-HJ-Z]\b))"),  # not "the answer is A stone"
    re.compile(r"\(([A-Za-z])\)"),
    re.compile(r"^\s*([A-Z])\s*(?:[.,:)]|$)"),
)


def parse_letter(text: str, problem: Problem) -> int | None:
    """Index of the choice that a generated text names, or None if it names none.

    "The answer is X." is the official form; of several the first counts, as in LaVIN's evaluation. A text without
    it is read for, in this order, "answer is X" with anything behind it, a letter in brackets, a letter alone at
    its start, and one single choice whose words it holds. Where nothing of that is found, or the problem has no
    choice of that letter, the official evaluation draws a choice at random; here the answer is None, which is wrong.
    """
    for pattern in _PATTERNS:
        found = pattern.search(text)
        if found:
            index = LETTERS.find(found[1].upper())
            return index if 0 <= index < len(problem.choices) else None
    said = text.lower()
    named = [index for index, choice in enumerate(problem.choices) if choice and choice.lower() in said]
    return named[0] if len(named) == 1 else None


def count(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems each column of the paper's table has."""
    return {name: sum(map(belongs, problems)) for name, belongs in COLUMNS.items()}


def accuracies(problems: Sequence[Problem], answers: Sequence[int | None]) -> dict[str, float | None]:
    """The share of right answers in each column of the paper's table; None for a column without problems.

    Raises:
        ValueError: if there are not as many answers as problems.
    """
    if len(problems) != len(answers):
        raise ValueError(f"There are {len(answers)} answers to {len(problems)} problems; give one per problem.")
    credits = [float(problem.answer == answer) for problem, answer in zip(problems, answers)]
    return _shares(problems, credits)


def chance(problems: Sequence[Problem]) -> dict[str, float | None]:
    """What guessing among each problem's choices gives on average, in each column."""
    return _shares(problems, [1 / len(problem.choices) for problem in problems])


def _shares(problems: Sequence[Problem], credits: Sequence[float]) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for name, belongs in COLUMNS.items():
        own = [credit for problem, credit in zip(problems, credits) if belongs(problem)]
        shares[name] = sum(own) / len(own) if own else None
    return shares


def accuracy_rows(
    problems: Sequence[Problem], results: dict[str, dict[str, float | None]], label: str = "model"
) -> list[list[str]]:
    """The paper's table as rows of text, in percent: a head, the counts, and one row per model."""
    rows = [[label, *COLUMNS], ["problems", *(str(number) for number in count(problems).values())]]
    for name, shares in results.items():
        rows.append([name, *("–" if share is None else f"{100 * share:.2f}" for share in shares.values())])
    return rows
