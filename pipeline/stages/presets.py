"""Stage presets: list the project's presets, with the result or the cost of each."""

from pathlib import Path

from pipeline.graph import Action, log

PRESETS = Path(__file__).parents[1] / "presets"


class Presets(Action):
    """List the presets; nothing is started or written."""

    name = "presets"
    writes = False

    def perform(self) -> None:
        """See Action."""
        for path in sorted(PRESETS.glob("*.toml")):
            log(f"{path.stem}\n    {preset_summary(path.read_text(encoding='utf-8'))}")


def preset_summary(text: str) -> str:
    """A preset's first line, and the measured result or estimated cost from its header."""
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#"]
    first, *others = comments
    known = [line for line in others if line.startswith(("Measured: ", "Not run: "))]
    return "\n    ".join([first, *known])
