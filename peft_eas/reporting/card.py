"""Model cards of adapters and of merged models: the front matter that the Hub reads, and a section for people.

What a card says about a merged model comes from its config, `config.eas`, so that it can be written whenever the model
is saved. A card that is there already keeps what people wrote; see `card_file`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..architectures import find_mhas
from ..runtime.checkpoint import CODE_FILE, INSTALL
from .card_file import ADAPTER_TAG, load_card, write_card
from .plots import draw_skip_map
from .provenance import is_same_mha, origin, record_speed, saved_numbers
from .search_result import COLUMNS, SearchResult, Unit, value_text

__all__ = ["adapter_card", "origin", "record_speed", "write_adapter_card", "write_merged_card"]

PICTURE = "eas_skip_map.png"
TAGS = ["arxiv:2403.15226", "efficient-attention-skipping", "peft_eas"]
PAPER = "[Efficient Attention Skipping](https://arxiv.org/abs/2403.15226)"
PLACEHOLDER = "path/or/hub-name/of/this/repository"
CONTEXTS = {
    "prompt": "the mean of each prompt",
    "running": "fixed, the mean of the prompts seen in training",
    "none": "none, the adapters read each token alone",
}
# Which Auto class loads a model class, and the Hub's name of its task; the first that fits.
AUTO_CLASSES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForMultipleChoice": "multiple-choice",
}


# --- the two cards ---------------------------------------------------------------------------------------------------


@contextmanager
def adapter_card(model: PeftModel, folder: str | os.PathLike) -> Iterator[None]:
    """Inside, PEFT writes its card of `model`, an EAS adapter, to `folder`; what is missing there is added at the end.

    What the user had set in the card's front matter outlives both.
    """
    before = load_card(Path(folder))
    yield
    write_adapter_card(model, folder, before.data.to_dict() if before else {})


def write_adapter_card(model: PeftModel, folder: str | os.PathLike, before: dict[str, Any] | None = None) -> None:
    """Writes or updates the card, and the picture of the skip set, of the active EAS adapter of `model`.

    Args:
        before: the front matter that holds the user's own values. Default: the card's.
    """
    eas, name = model.base_model, model.active_adapter
    config, facts = eas.peft_config[name], origin(eas, name)
    saved = config.to_dict()["skipped_modules"] or ()  # within a step of a search the model may skip others
    skipped = [mha for mha in eas.candidates if mha in saved]
    folder, is_over = Path(folder), config.skipped_modules is not None or not config.is_to_skip
    auto_class, task = _auto_class(type(eas.model))
    count = f"{len(skipped)} of {len(facts['candidates'])}"
    share = 100 * facts["trainable_parameters"] / model.get_nb_trainable_parameters()[1]
    hub_id = facts["base_model"]
    sections = [
        f"**{INSTALL}, and `import peft_eas` before you load this adapter.** Otherwise PEFT stops with "
        "`KeyError: 'EAS'`.",
        f"This is an adapter by {PAPER} for {_base_link(facts)}, made with PEFT and peft_eas. It skips {count} "
        "candidates among the attentions (MHAs); small linear adapters stand in their place. "
        "`model.merge_and_unload()` folds these into the weights and deletes the skipped attentions.",
        _facts_table(
            facts,
            task,
            ("Attentions skipped", count),
            ("Attentions never skipped", _kept(facts)),
            ("Attentions that were no candidates", _no_candidates(eas.model, facts)),
            ("Rank", _ranks(facts)),
            ("Up-projections", _paths(facts)),
            ("Context", CONTEXTS[facts["context"]]),
            ("Trainable parameters", f"{facts['trainable_parameters']:,} ({share:.2f} % of all)"),
            ("Numbers in the adapter's file", f"{saved_numbers(eas, name):,}"),
        ),
        *_search(facts, facts["candidates"], skipped),
        *_skip_map(facts, facts["candidates"], skipped, folder, is_over),
        "### Use",
        _code(
            "import peft_eas",
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            "",
            f'base = {auto_class}.from_pretrained("{hub_id or "path/to/the/base/model"}")',
            f'model = PeftModel.from_pretrained(base, "{PLACEHOLDER}")',
        ),
    ]
    tags = ["transformers", *TAGS, *([f"{ADAPTER_TAG}{hub_id}"] if hub_id else [])]
    data = {"base_model_relation": hub_id and "adapter", "library_name": "peft", "pipeline_tag": task, "tags": tags}
    write_card(folder, f"EAS adapter for {_base_name(facts)}", sections, data, facts, before)


def _own_import(model: PreTrainedModel) -> list[str]:
    """What must be imported besides, where the base is not transformers' own."""
    base = model._stock_class()
    is_own = base.__module__.partition(".")[0] not in ("transformers", "transformers_modules")
    return [f"import {base.__module__}  # {base.__name__}"] if is_own else []


def write_merged_card(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes or updates the card, and the picture of the skip set, of a model that `merge_and_unload` returned."""
    folder, record = Path(folder), model.config.eas
    facts = record.get("origin") or {}
    auto_class, task = _auto_class(type(model))
    candidates = facts.get("candidates") or list(record["skipped"])
    deleted = [name for name in candidates if any(is_same_mha(name, path) for path in record["skipped"])]
    count = f"{len(deleted)} of {len(candidates)}"
    size, base_size, trained = model.num_parameters(), facts.get("base_parameters"), facts.get("trainable_parameters")
    context = facts.get("context") if facts.get("context") == "none" else record.get("context") or facts.get("context")
    change = f" ({100 * (size / base_size - 1):+.1f} % against the base)" if base_size else ""
    fate = "stand there" if record.get("adapters") else "are folded into the weights"
    has_code = (folder / CODE_FILE).exists()
    call = f'model = {auto_class}.from_pretrained("{PLACEHOLDER}"{{}})'
    sections = [
        f"This is {_base_link(facts)} after fine-tuning by {PAPER} with PEFT and peft_eas: {count} attentions (MHAs) "
        f"are deleted, and the small linear adapters that were trained in their place {fate}. The KV cache holds "
        "nothing for the deleted attentions.",
        _facts_table(
            facts,
            task,
            ("Attentions deleted", count),
            ("Attentions never skipped", _kept(facts)),
            ("Attentions that were no candidates", _no_candidates(model, facts)),
            ("Rank of the adapters", _ranks(facts)),
            ("Up-projections", _paths(facts)),
            ("Context", CONTEXTS.get(context, "")),
            ("Parameters", f"{size:,}{change}"),
            ("Parameters trained", f"{trained:,}" if trained else ""),
        ),
        *_speed(record.get("speed")),
        *_search(facts, candidates, deleted),
        *_skip_map(facts, candidates, deleted, folder),
        "### Use",
        f"{INSTALL}, then:",
        _code("import peft_eas", *_own_import(model), f"from transformers import {auto_class}", "", call.format("")),
    ]
    if has_code:
        without = _code(f"from transformers import {auto_class}", "", call.format(", trust_remote_code=True"))
        sections += [f"Without it, by the code in `{CODE_FILE}` beside this card:", without]
    hub_id = facts.get("base_model")
    data = {
        "base_model_relation": hub_id and "finetune",
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": [*TAGS, *(["custom_code"] if has_code else [])],
    }
    write_card(folder, f"EAS merged into {_base_name(facts)}", sections, data, facts)


# --- parts of a card -------------------------------------------------------------------------------------------------


def _auto_class(model_class: type) -> tuple[str, str]:
    """The name of the Auto class that loads the class, and the Hub's name of the task."""
    name = model_class.__name__.removeprefix("EAS")
    for auto_class, task in AUTO_CLASSES.items():
        mapping = getattr(modeling_auto, auto_class)._model_mapping
        known = [*mapping._model_mapping.values(), *mapping._extra_content.values()]  # the latter were registered
        every = (one for names in known for one in (names if isinstance(names, (tuple, list)) else [names]))
        if name in (one if isinstance(one, str) else one.__name__ for one in every):
            return auto_class, task
    is_vision = getattr(model_class, "main_input_name", None) == "pixel_values"
    return "AutoModel", "image-feature-extraction" if is_vision else "feature-extraction"


def _base_name(facts: dict[str, Any]) -> str:
    return facts.get("base_model") or facts.get("base_name") or "a base model"


def _base_link(facts: dict[str, Any]) -> str:
    hub_id = facts.get("base_model")
    name = _base_name(facts)
    # The name of a folder may be any word.
    return f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else name if name.startswith("a ") else f"`{name}`"


def _ranks(facts: dict[str, Any]) -> str:
    if "r" not in facts:
        return ""
    kept = f"{facts['attention_r']} for a kept one" if facts["attention_r"] else "no adapter for a kept one"
    beside = f" and {facts['output_r']} beside its FFN's output" if facts.get("output_r") else ""
    before = f" and {facts['ffn_r']} in front of its FFN" if facts.get("ffn_r") else ""
    return f"{facts['r']} for a skipped attention{beside}, {kept}{before}"


def _kept(facts: dict[str, Any]) -> str:
    return f"{len(facts['kept'])} more, with adapters" if facts.get("kept") else ""


def _no_candidates(model: nn.Module, facts: dict[str, Any]) -> str:
    number = len(list(find_mhas(model))) - len(facts.get("candidates") or ()) - len(facts.get("kept") or ())
    return f"{number} more, unchanged" if "candidates" in facts and number > 0 else ""


def _paths(facts: dict[str, Any]) -> str:
    paths = facts.get("paths")
    return "" if paths is None else f"{paths}, mixed by a router" if paths > 1 else "1, without a router"


def _facts_table(facts: dict[str, Any], task: str, *own: tuple[str, str]) -> str:
    license, task_type = facts.get("license") or {}, facts.get("task_type")
    license_name = license.get("license_name") or license.get("license") or ""
    rows = [
        ("Base model", _base_link(facts)),
        ("Task", f"{task} ({task_type})" if task_type else task),
        *own,
        ("License of the base", license_name if isinstance(license_name, str) else ", ".join(license_name)),
        ("Made with", f"peft_eas {facts['peft_eas_version']}" if facts.get("peft_eas_version") else ""),
    ]
    return _table(("", ""), *((label, value) for label, value in rows if value))


def _speed(measurements: list[dict[str, Any]] | None) -> list[str]:
    if not measurements:
        return []
    rows = [
        (one["device"], *(f"{one[key]:.2f}×" if one[key] else "" for key in ("prefill", "decode")), one["against"],
         one["conditions"])
        for one in measurements
    ]  # fmt: skip
    table = _table(("Device", "Prefill", "Decode", "Compared with", "Conditions"), *rows)
    return ["### Speed", "How many times as fast as what it was compared with:", table]


def _search(facts: dict[str, Any], candidates: list[str], skipped: list[str]) -> list[str]:
    result, scores = SearchResult.of(facts.get("search")), facts.get("scores")
    if result is None or not scores:
        return []
    scores = {name: scores[name] for name in candidates if name in scores}  # JSON files have another order
    parts = ["### Search", result.sentence(scores, skipped)]
    if result.curve is not None:
        parts.append(
            "By the number of attentions skipped, the cheapest first, each with its standard deviation; before the "
            "training that followed the search:"
        )
        parts.append(_table(*result.table(scores, skipped)))
    return parts


def _skip_map(
    facts: dict[str, Any], candidates: list[str], skipped: list[str], folder: Path, is_over: bool = True
) -> list[str]:
    scores, result = facts.get("scores"), SearchResult.of(facts.get("search"))
    values = scores if not scores or result is None else result.values(scores, skipped)
    unit: Unit = "score" if result is None else result.unit
    parts = ["### Skip map"]
    if not is_over:
        parts.append("The search was not over when this was saved: these are the best attentions to skip so far.")
    try:
        draw_skip_map(candidates, skipped, values, folder / PICTURE, is_over, unit)
        parts.append(f"![Which attentions are kept and which are skipped]({PICTURE})")
    except ImportError:  # matplotlib is optional, and the table says the same
        pass
    rows = [(f"`{name}`", "skipped" if name in skipped else "kept") for name in candidates]
    head: tuple[str, ...] = ("Attention", "")
    if values:
        column, meaning = COLUMNS[unit]
        parts.append(meaning)
        cells = [value_text(values[name], unit) if name in values else "" for name in candidates]
        rows = [(*row, cell) for row, cell in zip(rows, cells)]
        head = (*head, column.capitalize())
    return [*parts, _table(head, *rows)]


def _table(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def _code(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))
