"""Pictures of a search, from what a run leaves behind. Needs matplotlib: `pip install matplotlib`.

Each function takes the search as any of: the folder of a run or of a checkpoint, the path of its `eas_search.json` or
`trainer_state.json`, or the record that is in these (`EASCallback.record`, `EASSearch.state_dict()`).
"""

from .loss_curve import plot_loss_curve
from .record import read_search
from .result import plot_result
from .search_curve import plot_search_curve
from .skip_map import draw_skip_map, plot_skip_map
from .style import KEPT, SKIPPED

__all__ = [
    "KEPT",
    "SKIPPED",
    "draw_skip_map",
    "plot_loss_curve",
    "plot_result",
    "plot_search_curve",
    "plot_skip_map",
    "read_search",
]
