"""Results on record: each stage's, of tiny runs, beside the version of the stage that made them.

A stage whose results change must have another version, or runs would reuse what older code made.
`golden.json` changes by one command: UPDATE_GOLDEN=1 pytest tests/integration
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden.json"
COMMAND = "UPDATE_GOLDEN=1 pytest tests/integration"


def check(stage: str, version: int, values: dict[str, Any], *, tolerance: float) -> None:
    """That the stage's values are those on record, or have a version of their own on record.

    Fails, with what to do, otherwise. On other processors rounding may move values a little: they
    may differ by the tolerance.
    """
    recorded = json.loads(GOLDEN.read_text())
    if os.environ.get("UPDATE_GOLDEN"):
        recorded[stage] = {"version": version, "values": values}
        GOLDEN.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
        return
    same = values.keys() == recorded[stage]["values"].keys() and all(
        value == pytest.approx(recorded[stage]["values"][key], abs=tolerance)
        for key, value in values.items()
    )
    constant = f"{stage.upper().replace('-', '_')}_VERSION"
    if version != recorded[stage]["version"]:
        pytest.fail(f"{constant} is new: record its results, {COMMAND}")
    if not same:
        pytest.fail(
            f"{stage} gives other results than version {version} did: raise {constant}, then "
            f"record them, {COMMAND}\nnow  {values}\nthen "
            f"{recorded[stage]['values']}"
        )


def moments(tensor: Tensor) -> list[float]:
    """Mean, standard deviation, and a mean with weights that tell the order."""
    flat = tensor.double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return [float(flat.mean()), float(flat.std()), float((weights * flat).mean())]
