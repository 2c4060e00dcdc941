"""Tokenizers as GGUF files hold them: which ones llama.cpp can stand in for, and what it needs to know of them.

The package gguf is imported when it is needed.
"""

import itertools
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from .exportable import Exportable


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for BPE with byte fallback, which goes by `scores`.
        pre: llama.cpp's name of what comes before BPE.
        tokens, types: one each for every row of the embedding; types as in `gguf.TokenType`.
        special: ids by their name in GGUF ("bos", "eos", ...).
        add_bos, add_eos: whether encoding a text adds them.
        add_space_prefix: whether a space is put in front of a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | dict[str, str] | None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names for what is done to a text before byte-level BPE, and whether whole words skip the merges.
_PRE: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_byte_level(True)], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(True)], False),
    "qwen2": (_split(_WORDS % ""), False),
    "llama-bpe": (_split(_WORDS % "{1,3}"), True),
    "dbrx": (_split(_WORDS % "{1,3}"), False),
}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, parts: Exportable) -> Vocabulary:
    """The vocabulary of a tokenizer, if llama.cpp splits text as it does.

    Raises:
        ValueError: if not, or if it does not fit the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with use_fast=True")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, and only BPE is exported")
    options = {key: model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    if any(options.values()):
        raise _refusal(f"its BPE has {options}, and these must be unset")
    vocab = model["vocab"]
    added = {token["content"]: token for token in data["added_tokens"]}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens, types = _tokens(vocab, added, model, parts.config.vocab_size)
    add_bos, add_eos = _added_to_a_text(tokenizer)
    shared = {
        **{"tokens": tokens, "types": types, "special": _special(tokenizer, parts)},
        **{"add_bos": add_bos, "add_eos": add_eos, "chat_template": tokenizer.chat_template},
    }
    if model["byte_fallback"]:
        prefix = _space_prefix(data, added)
        scores = _scores(vocab, added, merges, tokens)
        return Vocabulary("llama", "default", **shared, add_space_prefix=prefix, scores=scores)
    pre = _pre(data, model)
    return Vocabulary("gpt2", pre, **shared, add_space_prefix=False, merges=[" ".join(pair) for pair in merges])


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"llama.cpp would split text into other tokens than this tokenizer: {reason}. Exported are byte-level BPE as "
        "of GPT-2, SmolLM, Llama 3, DBRX and Qwen2, and BPE with byte fallback as of Llama 2. For another one, run "
        "the model with transformers or vLLM."
    )


def _pre(data: dict[str, Any], model: dict[str, Any]) -> str:
    """llama.cpp's name of what a byte-level tokenizer does before BPE."""
    ignore_merges = bool(model.get("ignore_merges"))
    step = data["pre_tokenizer"] or {"type": "nothing"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    names = [name for name, known in _PRE.items() if known == (steps, ignore_merges)]
    if not names:
        raise _refusal(
            f"its pre-tokenizer is {steps} with ignore_merges={ignore_merges}, which is none of those known"
        )
    normalizer = data["normalizer"]
    if normalizer == {"type": "NFC"}:
        warnings.warn(
            "This tokenizer brings text into Unicode's form NFC first, which llama.cpp does not. Texts that are not "
            "in that form (decomposed accents) become other tokens there; normalize them before.",
            stacklevel=4,
        )
    elif normalizer is not None:
        raise _refusal(f"its normalizer is {normalizer}, and there must be none")
    missing = set(ByteLevel.alphabet()) - model["vocab"].keys()
    if missing and model["unk_token"] is not None:  # without unk_token, both leave such bytes out
        raise _refusal(f"it makes {model['unk_token']!r} of {len(missing)} bytes that its vocabulary lacks")
    return names[0]


def _space_prefix(data: dict[str, Any], added: dict[str, dict[str, Any]]) -> bool:
    """Whether a tokenizer with byte fallback puts a space in front of a text and of what follows a special token."""
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    if (steps, pre) not in (([_PREPEND, _SPACES], None), ([_SPACES], None), ([None], metaspace)):
        raise _refusal(
            f"its normalizer is {normalizer} and its pre-tokenizer {pre}; with byte fallback, llama.cpp puts spaces "
            "in front of a text and of what follows a special token (normalizer Prepend, Replace) or nowhere (Replace)"
        )
    normalized = [token for token, entry in added.items() if entry["normalized"]]
    if normalized and steps != [None]:
        raise _refusal(f"its added tokens {normalized[:5]} are looked for in normalized text")
    return steps[0] == _PREPEND


def _scores(
    vocab: dict[str, int], added: dict[str, Any], merges: list[tuple[str, str]], tokens: list[str]
) -> list[float]:
    """Scores by which llama.cpp, which joins the two neighbours of the best score first, does the same merges."""
    missing = [byte for byte in _BYTES if byte not in vocab]
    if missing:
        raise _refusal(f"its vocabulary lacks the byte tokens {missing[:5]}")
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    known = set(merges)
    in_order = sorted(ranks.items(), key=lambda item: item[1][0])
    for (_, earlier), (token, later) in itertools.pairwise(in_order):
        if earlier[-1] > later[0]:
            raise _refusal(f"its merges into {token!r} stand between those into another token")
    texts = vocab.keys() - added.keys() - set(_BYTES)
    for token in texts:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair[0] in texts and pair[1] in texts and pair not in known:
                raise _refusal(f"its merges lack {pair}, although both and {token!r} are in its vocabulary")
    return [-float(ranks[token][0] if token in ranks else len(merges)) for token in tokens]


def _tokens(
    vocab: dict[str, int], added: dict[str, dict[str, Any]], model: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token get a name that no text has."""
    from gguf import TokenType

    ids = {**vocab, **{token: entry["id"] for token, entry in added.items()}}
    if max(ids.values()) >= rows:
        raise ValueError(
            f"The tokenizer has tokens up to id {max(ids.values())}, but the model's embedding has {rows} rows. Pass "
            "the tokenizer that belongs to the model."
        )
    odd = [token for token, e in added.items() if e["lstrip"] or e["rstrip"] or e["single_word"]]
    if odd:
        raise _refusal(
            f"its added tokens {odd[:5]} take in spaces beside them (lstrip, rstrip) or stand for words only"
        )
    by_id = {i: token for token, i in ids.items()}
    tokens, types = [], []
    for i in range(rows):
        token = by_id.get(i)
        if token is None:
            token, kind = f"[PAD{i}]", TokenType.UNUSED
            while token in ids:
                token = f"[{token}]"
        elif token in added:
            kind = TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        elif model["byte_fallback"] and token in _BYTES:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if model["byte_fallback"] and token == model["unk_token"]:
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _special(tokenizer: PreTrainedTokenizerBase, parts: Exportable) -> dict[str, int]:
    """Ids of the special tokens; the generation config's end tokens beside the tokenizer's are "eot" and "eom"."""
    ids = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    stop = getattr(parts.generation_config, "eos_token_id", None)
    stops = [tokenizer.eos_token_id, *(stop if isinstance(stop, (list, tuple)) else [stop])]
    ends = list(dict.fromkeys(i for i in stops if i is not None))
    if not ends:
        raise ValueError(
            "Neither the tokenizer nor the model's generation_config has an end-of-sequence token, and llama.cpp "
            "would take another one for it. Set tokenizer.eos_token."
        )
    if len(ends) > 3:
        warnings.warn(f"GGUF has room for three tokens that end a text; {ends[3:]} are left out.", stacklevel=4)
    ids.update(zip(("eos", "eot", "eom"), ends))
    return {name: i for name, i in ids.items() if i is not None}


def _added_to_a_text(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer adds its bos token before and its eos token after a text."""
    actual, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    for bos in (False, True):
        for eos in (False, True):
            before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
            if None not in before + after and actual == before + plain + after:
                return bos, eos
    raise _refusal(f"it makes {actual} of a text whose own tokens are {plain}, and only bos and eos can be added")
