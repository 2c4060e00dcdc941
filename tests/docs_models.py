"""The table in docs/models.md, as the table of architectures has it. Run as a script, it renews the page."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers

from peft_eas.architectures import ARCHITECTURES, UNSUPPORTED, Architecture

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- models: written by tests/docs_models.py -->"
END = "<!-- models: end -->"
HEAD = ("Model, as transformers calls it", "Block", "Attentions", "Targets by default")


def section() -> str:
    """The page's table, and what does not work and why, between the markers."""
    families = families_of([*ARCHITECTURES, *UNSUPPORTED])
    rows = [(_listed(families.get(block)), f"`{block}`", *described(rows)) for block, rows in ARCHITECTURES.items()]
    table = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
    reasons: dict[str, list[str]] = {}
    for block, reason in UNSUPPORTED.items():
        reasons.setdefault(reason, []).append(f"`{block}` ({_listed(families.get(block))})")
    unsupported = [f"* {', '.join(blocks)}: {reason}." for reason, blocks in reasons.items()]
    return "\n".join([BEGIN, *table, "", "Not supported:", "", *unsupported, END])


def described(rows: Architecture | Sequence[Architecture]) -> tuple[str, str]:
    """What a block's row, or rows, of the table say: its attentions, and when they are targets."""
    rows = [rows] if isinstance(rows, Architecture) else rows
    attentions = [f"{'cross' if row.is_cross else 'self'}-attention `{row.mha}`" for row in rows]
    kinds = {row.kind: "without a text model beside them" if row.kind == "vision" else "yes" for row in rows}
    is_one = len(set(kinds.values())) == 1
    targets = dict.fromkeys(text if is_one else f"{text} ({kind})" for kind, text in kinds.items())
    return ", ".join(dict.fromkeys(attentions)), ", ".join(targets)


def _listed(names: list[str] | None) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "—"


def families_of(blocks: Iterable[str]) -> dict[str, list[str]]:
    """By block class, the folders of transformers' models that define a class of that name."""
    definition = re.compile(rf"^class ({'|'.join(map(re.escape, blocks))})\(", re.MULTILINE)
    found: dict[str, list[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for block in definition.findall(path.read_text(encoding="utf-8")):
            found.setdefault(block, []).append(path.parent.name)
    return found


def on_page() -> str:
    """The section that stands on the page."""
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(on_page(), section()), encoding="utf-8")
