"""The configuration of Efficient Attention Skipping."""

import inspect
import json
import os
import re
import textwrap
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig

from .adapter_file import check_weights_file
from .budgets import BUDGETS, check_budgets
from .peft_type import add_peft_type
from .values import is_finite, is_int, python_number

PEFT_TYPE = add_peft_type()


def _with_fields_explained(config_class: type) -> type:
    """Adds to the class's docstring, in front of "Raises:", each field as its metadata["help"] explains it."""
    inherited = set(inspect.signature(PeftConfig).parameters)
    entries = [
        textwrap.fill(
            f"{f.name} ({f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)}, default "
            f"{f.default!r}): {f.metadata['help']}",
            width=115,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for f in sorted(fields(config_class), key=lambda f: f.name in inherited)
        if "help" in f.metadata
    ]
    head, raises, tail = (config_class.__doc__ or "").partition("    Raises:")
    config_class.__doc__ = "\n".join([f"{head}    Args:", *entries, "", f"{raises}{tail}"])
    return config_class


@_with_fields_explained
@dataclass
class EASConfig(PeftConfig):
    """Configuration of an [`EASModel`]: which MHAs may be skipped, how many, and what stands in their place.

    Source: Wu et al., arXiv 2403.15226; the defaults are the released values for a width of 4096, but for `output_r`
    and `ffn_r`, which the paper does not have.

    Raises:
        ValueError: for a value out of range and for fields that contradict each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The MHAs that may be skipped: a list of module names (or their endings) or a regular expression "
            "over full names. Default: every MHA of the text model, or of the only model there is."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "MHAs among the targets that get no adapter and are never skipped; same forms."},
    )
    kept_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "MHAs that get an adapter but are never skipped, such as those of a vision tower beside a text "
            "model; same forms. They need not be among the targets. `exclude_modules` goes before it: what both name "
            "gets no adapter."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the adapters, such as a new head, that are trained and saved."},
    )
    trainable_token_indices: list[int] | str | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained and saved besides the adapters, such as those that a chat "
            "template adds: their ids; or a dict from the names of embeddings, or their endings, to ids. An output "
            "layer that is tied to an embedding is trained with it."
        },
    )
    num_skip: int | None = field(
        default=None,
        metadata={
            "help": "How many MHAs the search of EASCallback skips: from 0 to the number of targets, without those "
            "that `kept_modules` names. Default: as many as `skipped_modules` names; without that, none, and nothing "
            "is searched."
        },
    )
    max_loss_increase: float | None = field(
        default=None,
        metadata={
            "help": "In place of `num_skip`: the search of EASCallback skips as many MHAs as raise the loss on the "
            "reward set by at most this share of it, such as 0.02, against nothing skipped."
        },
    )
    target_speedup: float | None = field(
        default=None,
        metadata={
            "help": "In place of `num_skip`: the search skips the MHAs that cost the least loss and make the merged "
            "model this many times as fast as the base, such as 1.15, by times measured on this machine."
        },
    )
    target_kv_cache: float | None = field(
        default=None,
        metadata={
            "help": "In place of `num_skip`: the search skips the MHAs that cost the least loss and leave this share "
            "of the base's KV cache, or less, such as 0.5."
        },
    )
    skipped_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Full names of the MHAs to skip. Give them to train without a search; a search writes here what "
            "it has found."
        },
    )
    r: int = field(default=32, metadata={"help": "Rank of the adapter (PIA) that stands for a skipped MHA."})
    attention_r: int = field(
        default=8, metadata={"help": "Rank of the adapter at the input of a kept MHA; 0 for no such adapter."}
    )
    output_r: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the output adapter, beside the output projection of a skipped MHA's FFN, which can write "
            "what the MHA wrote; 0 for no such adapter, as in the paper. Default: `r`. A mixture of experts, which "
            "has no such projection, gets none."
        },
    )
    ffn_r: int = field(
        default=0,
        metadata={
            "help": "Rank of the adapter in front of the FFN behind a kept MHA; 0 for no such adapter, as in the "
            "paper. A mixture of experts gets none."
        },
    )
    groups: int = field(
        default=2,
        metadata={"help": "Diagonal blocks of the up-projections; divides the ranks and the model's width."},
    )
    scale: float = field(default=1.0, metadata={"help": "Factor s on what an adapter adds to its input."})
    paths: int = field(
        default=2,
        metadata={
            "help": "Number of up-projections that an adapter's router mixes, by the context. 1: one up-projection "
            "and no router, as the paper has it for METER; always so with context='none'."
        },
    )
    router_temperature: float = field(
        default=10.0, metadata={"help": "Temperature τ of the router's softmax, above 0; higher mixes more evenly."}
    )
    dropout: float = field(
        default=0.1, metadata={"help": "Probability of dropping a unit of the bottleneck in training, in [0, 1)."}
    )
    context: Literal["prompt", "running", "none"] = field(
        default="prompt",
        metadata={
            "help": "The one statistic of the prompt that adapters read, a mean over its tokens. 'prompt': each "
            "sequence's own (the paper). 'running': one for all, the mean of the prompts seen in training; it is "
            "frozen, and the merge is exact. Training begins with 'prompt', and EASCallback turns it into 'running' "
            "when the search ends. 'none': adapters that read each token alone, z + s U dropout(C z), with one path "
            "and no router; the merge is exact at any time."
        },
    )
    context_recorded: bool = field(
        default=False,
        metadata={
            "help": "Whether every adapter in use had recorded its running mean when the context was frozen. Written "
            "by `freeze_context`; weights that come without it are then refused instead of taking zero in its place."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: adapters start as the identity. False: random adapters, for tests."},
    )
    base_shape: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Number of MHAs and widths of the base model, and whether it was merged with EAS. Written at "
            "injection, checked on loading."
        },
    )
    scores: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Score of each candidate, by its full name, as the search left them; the higher, the less it "
            "costs to skip the MHA. Written at the end of the search, and shown on the model card."
        },
    )
    fit_errors: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "By full name of each MHA whose adapters were fitted: the squared error that they left, as a "
            "share of what its block loses without it. Written by `fit_adapters`, before any training."
        },
    )
    search: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What the search expects of each number of skipped MHAs, and measured of those it chose. Written "
            "at its end, and shown on the model card."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # On a command line these are JSON, as in TrainingArguments.
        for name in ("base_shape", "scores", "fit_errors", "search", "trainable_token_indices"):
            if isinstance(getattr(self, name), str):
                with suppress(json.JSONDecodeError):
                    setattr(self, name, json.loads(getattr(self, name)))
        self._check_names()
        self.check_token_indices()
        self._check_numbers()
        self._check_skipped_modules()

    def _check_names(self) -> None:
        what = "a list of names of modules, or of their endings"
        for name in ("target_modules", "exclude_modules", "kept_modules", "modules_to_save"):
            value, is_pattern = getattr(self, name), name != "modules_to_save"
            if value is None:
                continue
            if isinstance(value, str) and value and is_pattern:
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(
                        f"EASConfig({name}={value!r}): a text is a regular expression over full names, and this one "
                        f"does not compile ({error}). Correct it, or give {what}."
                    ) from error
            elif isinstance(value, (list, tuple, set)) and all(isinstance(one, str) and one for one in value):
                setattr(self, name, set(value) if is_pattern else list(dict.fromkeys(value)))
            else:
                allowed = f"{what}, a regular expression over full names" if is_pattern else what
                raise ValueError(f"EASConfig({name}={value!r}): {name} must be {allowed}, or None.")

    def check_token_indices(self) -> None:
        """Checks `trainable_token_indices`, and leaves out repeats; again at injection, as TRL adds tokens till then.

        Raises:
            ValueError: for what are no token ids.
        """
        given = self.trainable_token_indices
        if given is None:
            return
        lists = given.values() if isinstance(given, dict) else [given]
        names = given if isinstance(given, dict) else ()
        if not all(isinstance(name, str) and name for name in names) or not all(
            isinstance(one, (list, tuple)) and all(is_int(python_number(index), 0) for index in one) for one in lists
        ):
            raise ValueError(
                f"EASConfig(trainable_token_indices={given!r}): trainable_token_indices must be a list of token ids "
                "of at least 0, a dict from names of embeddings to such lists, or None."
            )
        distinct = [list(dict.fromkeys(map(python_number, one))) for one in lists]
        self.trainable_token_indices = dict(zip(names, distinct)) if isinstance(given, dict) else distinct[0]

    def _check_numbers(self) -> None:
        def require(name: str, allowed: bool, what: str) -> None:
            if not allowed:
                raise ValueError(f"EASConfig({name}={getattr(self, name)!r}): {name} must be {what}.")

        for name in (
            *("r", "attention_r", "output_r", "ffn_r", "groups", "paths", "num_skip"),
            *("scale", "router_temperature", "dropout"),
            *BUDGETS,
        ):
            setattr(self, name, python_number(getattr(self, name)))
        for name, least in (("r", 1), ("attention_r", 0), ("ffn_r", 0), ("groups", 1), ("paths", 1)):
            require(name, is_int(getattr(self, name), least), f"an integer of at least {least}")
        for name in ("r", "attention_r"):
            rank = getattr(self, name)
            require(name, rank % self.groups == 0, f"a multiple of groups={self.groups}")
        is_rank = self.output_r is None or is_int(self.output_r, 0)
        require("output_r", is_rank, "an integer of at least 0, or None")
        if self.kept_modules:
            what = "at least 1 with kept_modules, unless ffn_r is, or these have no adapter; or use exclude_modules"
            require("attention_r", self.attention_r > 0 or self.ffn_r > 0, what)
        require("scale", is_finite(self.scale), "a finite number")
        require(
            "router_temperature",
            is_finite(self.router_temperature) and self.router_temperature > 0,
            "a finite number above 0",
        )
        require("dropout", is_finite(self.dropout) and 0 <= self.dropout < 1, "in [0, 1)")
        require("context", self.context in ("prompt", "running", "none"), "'prompt', 'running' or 'none'")
        if self.context == "none":  # without a context there is nothing to route by; 2 may be the default
            require("paths", self.paths in (1, 2), "left out, or 1, with context='none', which has no router")
            self.paths = 1
        for name in ("init_weights", "context_recorded"):
            require(name, isinstance(getattr(self, name), bool), "True or False")
        for name in ("search", "base_shape"):
            require(name, isinstance(getattr(self, name), (dict, type(None))), "a dict, or None")
        if self.num_skip is not None:
            require("num_skip", is_int(self.num_skip, 0), "an integer of at least 0, or None")
        check_budgets(self, require)
        for name in ("scores", "fit_errors"):
            values = getattr(self, name)
            if values is not None:
                is_right = isinstance(values, dict) and all(
                    isinstance(mha, str) and is_finite(python_number(value)) for mha, value in values.items()
                )
                require(name, is_right, "a dict from names of MHAs to finite numbers, or None")
                setattr(self, name, {mha: python_number(value) for mha, value in values.items()})

    def _check_skipped_modules(self) -> None:
        names = self.skipped_modules
        if names is None:
            return
        if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"EASConfig(skipped_modules={names!r}): give a list of full module names, or None.")
        self.skipped_modules = names = list(names)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"EASConfig: skipped_modules names {repeated} more than once; name each MHA once.")
        if self.num_skip is not None and self.num_skip != len(names):
            raise ValueError(
                f"EASConfig: num_skip={self.num_skip} contradicts skipped_modules, which names {len(names)}. Give "
                "num_skip for a search, or skipped_modules to go without one."
            )

    @property
    def budget(self) -> tuple[str, float] | None:
        """Name and value of what takes the place of `num_skip`, if anything."""
        return next(((name, value) for name in BUDGETS if (value := getattr(self, name)) is not None), None)

    @property
    def is_to_skip(self) -> bool:
        """Whether a search is to skip anything: there is a budget, or `num_skip` is above 0."""
        return self.budget is not None or bool(self.num_skip)

    def note_skipped_modules(self, names: list[str]) -> None:
        """Takes note of the skip set in force, which a checkpoint that is saved during the search shall name."""
        self._skipped_now = list(names)

    def note_scores(self, scores: dict[str, float]) -> None:
        """Takes note of the scores of a search that goes on."""
        self._scores_now = dict(scores)

    @property
    def current_scores(self) -> dict[str, float] | None:
        """The search's scores: those it left, or where they stand while it goes on."""
        return self.scores if self.scores is not None else getattr(self, "_scores_now", None)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary; during a search with the skip set in force as `skipped_modules`."""
        values = super().to_dict()
        # Sets would be written in another order each time.
        for name in ("target_modules", "exclude_modules", "kept_modules"):
            if isinstance(values[name], set):
                values[name] = sorted(values[name])
        if self.skipped_modules is None and getattr(self, "_skipped_now", None) is not None:
            values["skipped_modules"] = list(self._skipped_now)
            values["num_skip"] = len(self._skipped_now)
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "EASConfig":
        """Loads a config, and first makes sure that the weights beside it, if any, are whole and an EAS adapter's.

        PEFT reads the weights only after it has changed the base model; a bad file is refused here, before that.

        Raises:
            ValueError: if the weights file in the local folder is truncated, or holds no EAS adapter; if the config is
                another method's.
        """
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_weights_file(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not isinstance(config, cls):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds an adapter of the method {config.peft_type}, not of EAS. Load "
                "it with PeftConfig.from_pretrained, or name the folder of an EAS adapter."
            )
        return config
