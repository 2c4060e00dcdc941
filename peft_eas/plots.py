"""Pictures of what a search chose and how; they are drawn in `reporting.plots`."""

from .reporting.plots import plot_loss_curve, plot_search_curve, plot_skip_map

__all__ = ["plot_loss_curve", "plot_search_curve", "plot_skip_map"]
