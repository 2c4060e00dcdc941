"""The README's table of models, as the table of architectures has them. Run as a script, it renews the README."""

import re
from pathlib import Path

import transformers

from peft_eas import ARCHITECTURES, Architecture

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- models: written by tests/readme_models.py -->"
END = "<!-- models: end -->"
HEAD = ("Model, by its name in transformers", "Block", "Attentions", "Targets")
TARGETS = {
    "decoder": "by default",
    "encoder": "by default",
    "vision": "by default where there is no text model, else on request",
}
CROSS_ATTENTION = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)


def section() -> str:
    """The README's table, between its markers."""
    families = families_of(ARCHITECTURES)
    rows = [
        (", ".join(families.get(block) or ["—"]), f"`{block}`", *described(rows))
        for block, rows in ARCHITECTURES.items()
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * len(HEAD), *rows)]
    return "\n".join([BEGIN, *lines, END])


def described(rows: Architecture | tuple[Architecture, ...]) -> tuple[str, str]:
    """What a block's row, or rows, of the table say: its attentions, and when they are targets."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    kinds = ("cross-attention" if CROSS_ATTENTION.search(row.mha) else "self-attention" for row in rows)
    attentions = (f"{kind} `{row.mha}`" for kind, row in zip(kinds, rows))
    return ", ".join(attentions), "; ".join(dict.fromkeys(TARGETS[row.kind] for row in rows))


def families_of(blocks) -> dict[str, list[str]]:
    """By block class, the folders of transformers' models that define a class of that name."""
    definition = re.compile(rf"^class ({'|'.join(map(re.escape, blocks))})\(", re.MULTILINE)
    found: dict[str, list[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for block in definition.findall(path.read_text(encoding="utf-8")):
            found.setdefault(block, []).append(f"`{path.parent.name}`")
    return found


def in_readme() -> str:
    """The section that stands in the README."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(in_readme(), section()), encoding="utf-8")
