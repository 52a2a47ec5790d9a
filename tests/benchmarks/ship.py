"""Put the distilled set of a finished run among those that come with the package, with its card.

    python tests/benchmarks/ship.py runs/NAME fashionmnist-ipc10

Of the run's provenance only what says how the set was made goes along: no path of a machine.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import ncfm
from ncfm.synthetic import SHIPPED

PLACES = ("--storage_path", "--name", "--num_workers")
CARD = """# {name}

{count} learned images (28 x 28, grey; each holds {tiles} tiles) that stand in for the 60,000
training images of Fashion-MNIST: `ncfm.load("{name}")`.

Distilled by `{command}` at commit {commit}.

{networks} fresh ConvNets of width {width}, trained on this set alone for {epochs} epochs, reach
{accuracy} % on the complete test set after the last epoch (mean, and range over the networks).

Made from Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), which is MIT licensed: see
[LICENSE](../LICENSE-FASHION-MNIST).
"""


def without_places(command: str) -> str:
    """The command of a run without the paths of its machine."""
    words = iter(shlex.split(command))
    kept: list[str] = []
    for word in words:
        if word in PLACES:
            next(words)
        elif word == "--source.path":
            next(words)
            kept += [word, "FASHION_MNIST"]
        else:
            kept.append(word)
    return shlex.join(kept)


def ship(run: Path, name: str) -> None:
    """Write the set of `run` and its card. Raises FileNotFoundError if the run is not finished."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    row: dict[str, Any] = next(r for r in evaluation["rows"] if r["set"] == "distilled")
    synthetic = ncfm.load(run / "distilled")
    old = synthetic.provenance
    command = without_places(old["command"])
    provenance = {"command": command, "seed": old["seed"], "versions": old["versions"]}
    dataclasses.replace(synthetic, provenance=provenance).save(SHIPPED / name)
    scores = [100 * value for value in row["accuracy"]]
    card = CARD.format(
        name=name,
        count=len(synthetic.images),
        tiles=synthetic.factor**2,
        command=command,
        commit=old["versions"]["git"][:9],
        networks=len(scores),
        width=old["config"]["model"]["width"],
        epochs=row["epochs"],
        accuracy=f"{statistics.fmean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})",
    )
    (SHIPPED / name / "README.md").write_text(card)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    ship(arguments.run, arguments.name)


if __name__ == "__main__":
    main()
