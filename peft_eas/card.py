"""Model cards and what they tell; they are written in `reporting.card`."""

from .reporting.provenance import record_speed

__all__ = ["record_speed"]
