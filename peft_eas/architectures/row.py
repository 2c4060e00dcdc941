"""A row of the table of architectures: where the parts of one transformer block are."""

import operator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

Kind = Literal["decoder", "encoder", "vision", "audio"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one transformer block are, for one of its MHAs; every path is relative to the block.

    Attributes:
        mha: the multi-head attention, the module that is wrapped and may be skipped.
        mha_projections: the projections that read the MHA's input (of a cross-attention, the query's).
        ffn: the module in front of whose input the PIA stands.
        ffn_projections: the projections that read the FFN's input: modules with a weight, or parameters of shape
            (experts, outputs, width), or (experts, width, outputs) where `transposed` names them.
        input_norm: the norm that only feeds the MHA and is deleted with it (pre-norm blocks), or None.
        shared_norm: the norm that feeds both the MHA and the FFN beside it (parallel blocks), or None.
        output_norm: what only the MHA feeds, in front of the residual (a norm or a scale); deleted too, or None.
        kept_norm: the norm inside the MHA that a skipped block still applies, y = norm(x) (post-norm blocks), or None.
        core: the part of the MHA that holds its projections, where the MHA also reads its input for a residual, which
            its adapter must not touch (post-norm blocks); or None.
        branch: the block's children that make up its FFN branch, in order, where y = x + branch(x) is all that the
            block computes without its MHA; None where it is more, so that a merged block runs the stock code.
        kind: which tokens are the prompt: "decoder", those before the answer; "encoder", all that are attended to;
            "vision" and "audio", all. The MHAs of a vision tower are no default targets where there are others.
        attends: names of the MHA's arguments that hold the states and the mask of what it attends to, where the
            context is the mean over these: of a cross-attention, the other modality's tokens (section 4.1 of the
            paper, METER); of an encoder whose mask is made inside the model, ("hidden_states", "attention_mask").
        returns: what the MHA returns behind its output: per value, the name of the argument that a skipped MHA hands
            on in its place, or None for nothing. None as a whole: the output alone, not in a tuple.
        experts: whether the FFN is a mixture of experts, whose projections have no bias: what an adapter adds to every
            token alike then stays in front of the FFN, as one vector.
        transposed: those of `ffn_projections` that store (…, width, outputs).
        where: attributes of the block, by their path, and the values they must have for the row to apply; None for an
            attribute that the block must not have.
        output_projection: the projection that writes the FFN's output, beside which the output adapter stands; None
            where there are several, as in a mixture of experts, or where no output adapter is wanted.
    """

    mha: str
    mha_projections: tuple[str, ...]
    ffn: str
    ffn_projections: tuple[str, ...]
    input_norm: str | None = None
    shared_norm: str | None = None
    output_norm: str | None = None
    kept_norm: str | None = None
    core: str | None = None
    branch: tuple[str, ...] | None = None
    kind: Kind = "decoder"
    attends: tuple[str, str] | None = None
    returns: tuple[str | None, ...] | None = (None,)
    experts: bool = False
    transposed: tuple[str, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)
    output_projection: str | None = None

    def __post_init__(self) -> None:
        if self.branch is not None and self.ffn not in self.branch:
            raise ValueError(
                f"Architecture(branch={self.branch!r}) does not contain ffn={self.ffn!r}. Name the FFN and the norms "
                "and dropouts around it, in order, or leave branch out."
            )
        if self.kind not in KINDS:
            raise ValueError(f"Architecture(kind={self.kind!r}): kind must be one of {', '.join(map(repr, KINDS))}.")
        for name, root in (("mha_projections", self.mha), ("ffn_projections", self.ffn)):
            paths = getattr(self, name)
            is_right = isinstance(paths, tuple) and len(paths) > 0
            if not is_right or not all(isinstance(p, str) and f"{p}.".startswith(f"{root}.") for p in paths):
                raise ValueError(
                    f"Architecture({name}={paths!r}): {name} must be a tuple of paths of modules in {root!r}, such as "
                    f"('{root}.in_proj',)."
                )

    @property
    def deleted_norms(self) -> tuple[str, ...]:
        """What is not computed where the MHA is skipped, beside the MHA."""
        return tuple(norm for norm in (self.input_norm, self.output_norm) if norm is not None)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path that a block of this row has; its output projection is asked for with output adapters alone."""
        given = (self.mha, *self.mha_projections, self.ffn, *self.ffn_projections, *self.deleted_norms)
        return given + tuple(path for path in (self.kept_norm, self.core) if path is not None)

    @property
    def is_cross(self) -> bool:
        """Whether the MHA attends to other states than its own input."""
        return self.attends is not None and self.attends[0] != "hidden_states"

    def is_asked_for(self, block: nn.Module) -> bool:
        """Whether `block` has the attributes that `where` asks for."""
        return all(at_path(block, path) == value for path, value in self.where.items())


def has_path(module: nn.Module, path: str) -> bool:
    """Whether `path` leads from `module` to anything but None."""
    return at_path(module, path) is not None


def at_path(module: nn.Module, path: str) -> Any:
    """What `path` leads to from `module`, which is itself for an empty one; None where there is nothing."""
    try:
        return operator.attrgetter(path)(module) if path else module
    except AttributeError:
        return None


def named(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names.split())


# Of an encoder whose mask is made inside the model.
OWN_TOKENS = ("hidden_states", "attention_mask")


def join(prefix: str, name: str) -> str:
    """The path `name` below the module of the path `prefix`, which may be empty."""
    return f"{prefix}.{name}" if prefix else name
