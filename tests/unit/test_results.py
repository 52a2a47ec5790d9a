"""The documents say what the measured rows say, and nothing else."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "results", ROOT / "tests" / "benchmarks" / "results.py"
)
assert SPEC is not None
assert SPEC.loader is not None
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)


def row(**values: Any) -> dict[str, Any]:
    found = {"data": "D", "preset": "p", "ipc": 1, "set": "distilled", "network": "convnet"}
    found |= {"width": 64, "seed": 0, "method": "", "accuracy": [0.5, 0.6], "steps": 10}
    found |= {"evaluation_epochs": 5}
    return {**found, "options": {}, "hours": 1.0, "commit": "0123456789abc", **values}


def test_the_documents_are_made_from_the_rows() -> None:
    stale = [path.name for path, text in results.documents().items() if path.read_text() != text]
    assert not stale, "python tests/benchmarks/results.py tables"


def test_every_row_is_complete() -> None:
    rows = results.read_jsonl(results.ROWS)
    assert rows
    for found in rows:
        assert {"machine", "commit", "date", "hours", *results.MEASUREMENT} <= found.keys()
        assert all(0 < value < 1 for value in found["accuracy"])
    assert len({results.key(found) for found in rows}) == len(rows)


def test_the_error_is_over_seeds_if_there_are_several() -> None:
    one, other = row(), row(seed=1, accuracy=[0.65, 0.65])
    assert results.accuracy([one]) == "55.00 ± 5.00"
    assert results.accuracy([one, other]) == "60.00 ± 5.00"
    assert results.accuracy([row(accuracy=[0.5])]) == "50.00"


def test_the_best_group_is_shown_beside_the_best_that_was_published() -> None:
    rows = [row(), row(steps=20, accuracy=[0.7]), row(set="random", accuracy=[0.9])]
    published = [
        {"data": "D", "ipc": 1, "method": m, "accuracy": a} for m, a in (("A", 61), ("B", 62))
    ]
    last = results.readme_table(rows, published).splitlines()[-1]
    assert last == "| D | 1 | 70.00 | 1 x 1, width 64 | 20 | 62.0 (B) |"


def test_a_row_of_the_same_measurement_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(results, "rows_of", lambda *_: [row(accuracy=[0.4])])
    for _ in range(2):
        results.record([Path("run")], "D", None, "m")
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert json.loads(line)["accuracy"] == [0.4]


def test_a_readme_without_its_marks_is_told() -> None:
    with pytest.raises(ValueError, match="once each"):
        results.with_table("no marks", "")
