"""The configuration of Efficient Attention Skipping."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from .peft_type import add_peft_type

PEFT_TYPE = add_peft_type()


@dataclass
class EASConfig(PeftConfig):
    """Configuration of an [`EASModel`]: which MHAs may be skipped, how many, and what stands in their place.

    Source: Wu et al., arXiv 2403.15226; the defaults are the released values for a width of 4096.

    Args:
        target_modules: the MHAs that may be skipped.
        exclude_modules: MHAs that are not touched.
        modules_to_save: modules besides the adapters that are trained and saved.
        num_skip: how many MHAs to skip.
        skipped_modules: which MHAs to skip.
        r: rank of the adapter of a skipped MHA.
        attention_r: rank of the adapter of a kept MHA.
        groups: diagonal blocks of the up-projections.
        scale: factor on the adapters' output.
        router_temperature: temperature of the router.
        dropout: dropout in the bottleneck.
        context: what the adapters' context is.
        init_weights: whether the adapters start as the identity.
        base_shape: shape of the base model, written at injection.
        scores: the search's scores, written by it.

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
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules besides the adapters, such as a new head, that are trained and saved."},
    )
    num_skip: int | None = field(
        default=None,
        metadata={
            "help": "How many MHAs the search (EASCallback) skips, at least 0 and at most as many as there are "
            "targets. Default: as many as `skipped_modules` names, else none."
        },
    )
    skipped_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Full names of the MHAs to skip. Given by the user to go without a search; written by the search."
        },
    )
    r: int = field(default=32, metadata={"help": "Rank of the adapter (PIA) that stands for a skipped MHA."})
    attention_r: int = field(
        default=8, metadata={"help": "Rank of the adapter at the input of a kept MHA; 0 for no such adapter."}
    )
    groups: int = field(
        default=2,
        metadata={"help": "Diagonal blocks of the up-projections; divides the ranks and the model's width."},
    )
    scale: float = field(default=1.0, metadata={"help": "Factor s on what an adapter adds to its input."})
    router_temperature: float = field(
        default=10.0, metadata={"help": "Temperature τ of the router's softmax, above 0; higher mixes more evenly."}
    )
    dropout: float = field(
        default=0.1, metadata={"help": "Probability of dropping a unit of the bottleneck in training, in [0, 1)."}
    )
    context: Literal["prompt", "running"] = field(
        default="prompt",
        metadata={
            "help": "'prompt': the mean over each sequence's own prompt (the paper). 'running': the running mean of "
            "the prompts' means seen in training, frozen; exact under a merge. Training ends in 'running'."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: adapters start as the identity. False: random adapters, for tests."},
    )
    base_shape: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Number of MHAs and widths of the base model. Written at injection, checked on loading."},
    )
    scores: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Score of each candidate, by its full name, as the search left them; the higher, the less it "
            "costs to skip the MHA. Written at the end of the search, and shown on the model card."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in ("base_shape", "scores"):  # on a command line these are JSON, as in TrainingArguments
            if isinstance(getattr(self, name), str):
                with suppress(json.JSONDecodeError):
                    setattr(self, name, json.loads(getattr(self, name)))
        self._check_numbers()
        self._check_skipped_modules()

    def _check_numbers(self) -> None:
        def require(name: str, allowed: bool, what: str) -> None:
            if not allowed:
                raise ValueError(f"EASConfig({name}={getattr(self, name)!r}): {name} must be {what}.")

        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        require("r", is_int(self.r) and self.r >= 1, "an integer of at least 1")
        require("attention_r", is_int(self.attention_r) and self.attention_r >= 0, "an integer of at least 0")
        require("groups", is_int(self.groups) and self.groups >= 1, "an integer of at least 1")
        for name in ("r", "attention_r"):
            rank = getattr(self, name)
            require(name, rank % self.groups == 0, f"a multiple of groups={self.groups}")
        require("scale", is_number(self.scale) and abs(self.scale) < float("inf"), "a finite number")
        require(
            "router_temperature",
            is_number(self.router_temperature) and 0 < self.router_temperature < float("inf"),
            "a finite number above 0",
        )
        require("dropout", is_number(self.dropout) and 0 <= self.dropout < 1, "in [0, 1)")
        require("context", self.context in ("prompt", "running"), "'prompt' or 'running'")
        if self.num_skip is not None:
            require("num_skip", is_int(self.num_skip) and self.num_skip >= 0, "an integer of at least 0, or None")
        if self.base_shape is not None:
            require("base_shape", isinstance(self.base_shape, dict), "a dict, or None")
        if self.scores is not None:
            is_right = isinstance(self.scores, dict) and all(
                isinstance(name, str) and is_number(score) and abs(score) < float("inf")
                for name, score in self.scores.items()
            )
            require("scores", is_right, "a dict from names of MHAs to finite numbers, or None")

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

    def note_skipped_modules(self, names: list[str]) -> None:
        """Takes note of the skip set in force, which a checkpoint that is saved during the search shall name."""
        self._skipped_now = list(names)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary; during a search with the skip set in force as `skipped_modules`."""
        values = super().to_dict()
        for name in ("target_modules", "exclude_modules"):  # sets, which would be written in another order each time
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
            ValueError: if the weights file in the local folder is truncated, or holds no EAS adapter.
        """
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        _check_weights_file(os.path.join(folder, "adapter_model.safetensors"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _check_weights_file(path: str) -> None:
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or not a safetensors file. Copy or download the "
            "adapter again."
        ) from error
    if not any(".eas_" in key for key in keys):
        found = ", ".join(keys[:3]) or "no tensor at all"
        raise ValueError(
            f"{path} holds no EAS adapter (no key with '.eas_'; it holds {found}). Load it with the method that "
            "wrote it, or put the EAS adapter's own file in its place."
        )
