"""The table that `eas_summary` returns."""

from dataclasses import dataclass

from .search_result import COLUMNS, SearchResult, Unit, value_text


@dataclass(frozen=True)
class SummaryRow:
    """One MHA.

    Attributes:
        name: full name.
        state: "skipped" or "kept"; "never skipped", which `kept_modules` of the config names; "deleted" by a merge;
            "excluded" by the config; or "no target".
        score: the search's, or None.
        parameters: of the MHA, without a norm inside it that a skipped block still applies; 0 if it was deleted before
            the adapters came.
        adapter_parameters: of the adapter in use for it; in a merged model, of one that stays.
        saved_parameters, saved_flops: by how much a merged model is smaller, and computes less per token, if this MHA
            is skipped. Parameters: the MHA's and those of the norms that are deleted with it, less the biases that
            folding PIA adds to the FFN, or PIA itself where it stays.
        added_parameters, added_flops: what the adapter of a kept MHA leaves in the same way.
        fit_error: what `fit_adapters` left, as a share of what the block loses without the MHA; or None.
    """

    name: str
    state: str
    score: float | None
    parameters: int
    adapter_parameters: int
    saved_parameters: int
    saved_flops: int
    added_parameters: int = 0
    added_flops: int = 0
    fit_error: float | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether the MHA is not computed."""
        return self.state in ("skipped", "deleted")

    def cells(self, value: str | None = None) -> tuple[str, ...]:
        """What the table shows, with `value` in place of the score."""
        score = "" if self.score is None else value or f"{self.score:+.4f}"
        saved = (f"{number:,}" for number in (self.saved_parameters, self.saved_flops))
        return (
            *(self.name, self.state, score, f"{self.parameters:,}", f"{self.adapter_parameters:,}"),
            *(saved if self.is_skipped else (f"({number})" for number in saved)),
        )


@dataclass(frozen=True)
class Summary:
    """What `eas_summary` returns; `print` shows it as a table.

    Attributes:
        rows: one per MHA, in the model's order.
        base_parameters, base_flops: of the whole base model; FLOPs per token.
        context_length: how many tokens a token attends to, as FLOPs are counted.
        image_tokens: the same in a vision tower of which the number is fixed, unless a context_length was given.
        search: what the search found, or None.
    """

    rows: list[SummaryRow]
    base_parameters: int
    base_flops: int
    context_length: int
    image_tokens: int | None = None
    search: SearchResult | None = None

    @property
    def skipped(self) -> list[SummaryRow]:
        """The MHAs that are not computed."""
        return [row for row in self.rows if row.is_skipped]

    @property
    def candidates(self) -> list[SummaryRow]:
        """The MHAs that may be skipped, and those that are."""
        return [row for row in self.rows if row.is_skipped or row.state == "kept"]

    @property
    def saved_parameters(self) -> int:
        """By how much a merged model is smaller than the base."""
        added = sum(row.added_parameters for row in self.rows)
        return sum(row.saved_parameters for row in self.skipped) - added

    @property
    def saved_flops(self) -> int:
        """By how much a merged model computes less than the base per token."""
        return sum(row.saved_flops for row in self.skipped) - sum(row.added_flops for row in self.rows)

    def __str__(self) -> str:
        unit: Unit = "score" if self.search is None else self.search.unit
        scores, skipped = self._scores(), [row.name for row in self.skipped]
        values = scores if self.search is None else self.search.values(scores, skipped)
        notes = [self.search.sentence(scores, skipped), COLUMNS[unit][1]] if self.search and scores else []
        head = ("MHA", "state", COLUMNS[unit][0], "parameters", "adapter", "saved parameters", "saved FLOPs/token")
        sums = (
            sum(row.parameters for row in self.rows),
            sum(row.adapter_parameters for row in self.rows),
            self.saved_parameters,
            self.saved_flops,
        )
        wholes = (*[self.base_parameters] * 3, self.base_flops)
        count = f"{len(self.skipped)} of {len(self.candidates)}"
        lines = [
            head,
            *(row.cells(value_text(values[row.name], unit) if row.name in values else None) for row in self.rows),
            ("total", count, "", *(f"{number:,}" for number in sums)),
            ("of the base model", "", "", *(f"{100 * part / whole:.2f} %" for part, whole in zip(sums, wholes))),
        ]
        if any(row.fit_error is not None for row in self.rows):
            errors = ("" if row.fit_error is None else f"{100 * row.fit_error:.0f} %" for row in self.rows)
            lines = [(*line[:3], error, *line[3:]) for line, error in zip(lines, ("fit error", *errors, "", ""))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ]
        ruler = "-" * len(table[0])
        tokens = f"{self.context_length:,} tokens to attend to"
        if self.image_tokens == self.context_length:
            tokens += ", the model's own number for an image"
        elif self.image_tokens is not None:
            tokens += f", and {self.image_tokens:,} in an image"
        others = [row.state for row in self.rows if row not in self.candidates]
        states = ", ".join(f"{others.count(state)} {state}" for state in dict.fromkeys(others))
        more = [f"The total counts candidates; the other MHAs: {states}."] if others else []
        return "\n".join(
            [
                *(table[0], ruler, *table[1:-2], ruler, table[-2], table[-1].rstrip(), ""),
                f"Base model: {self.base_parameters:,} parameters, {self.base_flops:,} FLOPs/token.",
                f"Merged: {self.base_parameters - self.saved_parameters:,} parameters, "
                f"{self.base_flops - self.saved_flops:,} FLOPs/token.",
                f"FLOPs with {tokens}. In parentheses: what skipping one more saves.",
                *notes,
                *more,
            ]
        )

    def _scores(self) -> dict[str, float]:
        return {row.name: row.score for row in self.rows if row.score is not None}
