"""The stages of a long command, each of which is done once: a command that is started again goes on where it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.shared.json_lines import append_line, read_lines


class Stages:
    """The figures of finished stages, a JSON line each, in `folder`/stages.jsonl.

    Args:
        folder: the command's output folder; made if need be.
        settings: what the figures depend on, as values for JSON.

    Raises:
        SystemExit: if `folder` holds stages that were run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.file = folder / "stages.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        records = read_lines(self.file)
        self.done: dict[str, Any] = {record["stage"]: record["figures"] for record in records}
        earlier = self.done.setdefault("settings", settings)
        changed = sorted(name for name in {*earlier, *settings} if earlier.get(name) != settings.get(name))
        if changed:
            name = changed[0]
            raise SystemExit(
                f"{folder} holds the stages of a run with {name}={earlier.get(name)!r}; this one has "
                f"{settings.get(name)!r} ({len(changed)} settings differ). Give the same settings to go on with it, "
                "or another --output-dir."
            )
        if not records:
            append_line(self.file, {"stage": "settings", "figures": settings})

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        """The figures of the stage `name`, which is run if it is not done; they are values for JSON."""
        if name in self.done:
            print(f"{name}: done before", flush=True)
        else:
            figures = stage()
            append_line(self.file, {"stage": name, "figures": figures})
            self.done[name] = figures
        return self.done[name]
