"""The file of a model card: a section between two markers, and front matter; what people wrote there stays.

Only what lies between the markers is written anew. The unfilled template that PEFT and transformers start every card
from gives way.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from .provenance import CARD, hub_id_of

BEGIN, END = "<!-- peft_eas: what stands between these two lines is written anew -->", "<!-- peft_eas: end -->"
ADAPTER_TAG, PEFT_VERSION = "base_model:adapter:", "- PEFT "


def load_card(folder: Path) -> ModelCard | None:
    """The folder's card, or None if there is none that can be read."""
    try:
        return ModelCard.load(folder / CARD) if (folder / CARD).is_file() else None
    except (ValueError, TypeError, YAMLError):
        return None


def write_card(
    folder: Path,
    title: str,
    sections: list[str],
    ours: dict[str, Any],
    facts: dict[str, Any],
    before: dict[str, Any] | None = None,
) -> None:
    """Puts the sections and the front matter into the folder's card. The user's own text and choices stay."""
    path, card = folder / CARD, load_card(folder)
    if card is None and path.is_file():
        warnings.warn(
            f"The front matter of {path} cannot be read, so the card is left as it is. Repair the part between the "
            "two lines `---`, and save again.",
            stacklevel=2,
        )
        return
    card = card or ModelCard("---\n\n---\n")
    before = card.data.to_dict() if before is None else before
    named = before.get("base_model")
    named_are_on_hub = all(hub_id_of(name) for name in _listed(named))
    base_model = facts.get("base_model") or (named if _listed(named) and named_are_on_hub else None)
    tags = {*ours["tags"], *_listed(before.get("tags")), *_listed(card.data.tags)}
    values = {
        "base_model": base_model,
        "base_model_relation": ours["base_model_relation"] or (base_model and before.get("base_model_relation")),
        "library_name": ours["library_name"],
        "pipeline_tag": before.get("pipeline_tag") or ours["pipeline_tag"],
        # PEFT names folders here as well, which the Hub does not take.
        "tags": sorted(
            tag for tag in tags if not tag.startswith(ADAPTER_TAG) or hub_id_of(tag.removeprefix(ADAPTER_TAG))
        ),
        **({} if before.get("license") else facts.get("license") or {}),
    }
    for key, value in values.items():
        if value:
            card.data[key] = value
        else:
            card.data.pop(key, None)
    section = "\n\n".join([BEGIN, "## Efficient Attention Skipping", *sections, END])
    if _is_unfilled(card.text):
        versions = [line for line in card.text.splitlines() if line.startswith(PEFT_VERSION)]
        tail = ["### Framework versions", "\n".join(versions)] if versions else []
        card.text = "\n\n".join([f"\n# {title}", section, *tail])
    elif BEGIN in card.text and END in card.text:
        head, _, rest = card.text.partition(BEGIN)
        card.text = head + section + rest.partition(END)[2]
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    card.text = card.text.rstrip() + "\n"
    card.save(path)


def _listed(value: Any) -> list[str]:
    """What a person may have written for a list of words, as one."""
    words = value if isinstance(value, list) else [value]
    return [word for word in words if isinstance(word, str)]


def _is_unfilled(text: str) -> bool:
    """Whether a card's text is empty, or the template without anything that a person has written into it."""
    by_machine = (
        "### Framework versions",
        PEFT_VERSION,
        "This is the model card of a 🤗 transformers model that has been",
    )
    lines = [line for line in text.splitlines() if line and not line.startswith(by_machine)]
    return _template_lines().issuperset(lines)


@cache
def _template_lines() -> frozenset[str]:
    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())
