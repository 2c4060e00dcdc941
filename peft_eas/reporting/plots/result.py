"""Pictures from what an adapter or a merged model keeps of a search: what was found, and not how."""

import json
from pathlib import Path

from ...config import EASConfig
from ..provenance import is_same_mha
from ..search_result import SearchResult, Unit
from .loss_curve import draw_loss_curve
from .skip_map import draw_skip_map


def plot_result(path: Path, folder: Path) -> list[Path]:
    """Draws into `folder` what the adapter or merged model at `path` knows of its search, and returns the pictures.

    Raises:
        ImportError: without matplotlib. ValueError: if there is no result of a search.
    """
    scores, skipped, result = _result_of_search(path)
    # JSON files have names in the order of the alphabet, in which layer 10 comes before layer 2.
    candidates = sorted(scores, key=lambda name: [one.zfill(9) if one.isdigit() else one for one in name.split(".")])
    values = scores if result is None else result.values(scores, skipped)
    unit: Unit = "score" if result is None else result.unit
    pictures = [draw_skip_map(candidates, skipped, values, folder / "skip_map.png", unit=unit)]
    if result is not None and result.curve is not None:
        in_order = {name: scores[name] for name in candidates}
        pictures.append(draw_loss_curve(result, in_order, skipped, folder / "loss_curve.png"))
    return pictures


def _result_of_search(path: Path) -> tuple[dict[str, float], list[str], SearchResult | None]:
    """Scores, skipped MHAs, and the rest."""
    if (path / "adapter_config.json").is_file():
        config = EASConfig.from_pretrained(str(path))
        scores, skipped, saved = config.scores, config.skipped_modules or [], getattr(config, "search", None)
    else:
        file = path / "config.json"
        record = json.loads(file.read_text(encoding="utf-8")).get("eas") if file.is_file() else None
        origin = (record or {}).get("origin") or {}
        scores, saved = origin.get("scores"), origin.get("search")
        deleted = (record or {}).get("skipped", ())
        skipped = [name for name in scores or () if any(is_same_mha(name, path) for path in deleted)]
    if not scores:
        raise ValueError(
            f"{path} holds no result of a search. Name the output_dir of a run with EASCallback that searched, one of "
            "its checkpoints, its eas_search.json, or an adapter or merged model that came from it."
        )
    return scores, skipped, SearchResult.of(saved)
