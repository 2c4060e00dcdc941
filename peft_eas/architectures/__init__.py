"""Where each model family keeps its MHAs, norms, FFNs and projections: one row per block, by kind of model."""

from .row import Architecture, at_path, has_path, join
from .table import (
    ARCHITECTURES,
    UNSUPPORTED,
    default_targets,
    find_mhas,
    reasons_against,
    rows_of,
    unknown_architecture_message,
)

__all__ = [
    "ARCHITECTURES",
    "UNSUPPORTED",
    "Architecture",
    "at_path",
    "default_targets",
    "find_mhas",
    "has_path",
    "join",
    "reasons_against",
    "rows_of",
    "unknown_architecture_message",
]
