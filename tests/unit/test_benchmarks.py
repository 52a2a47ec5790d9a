"""The benchmarks' rows, and the table that the README shows of them."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import record
import run_all

ROW = record.Row(
    benchmark="b", case="c", variant="old", quantity="q", unit="s", median=2.0, low=1.0, high=3.0,
    runs=3, machine="m", date="2026-01-01", commit="0123456", command="python x.py",
)  # fmt: skip


def row(**values: Any) -> record.Row:
    return dataclasses.replace(ROW, **values)


def lines(*rows: record.Row) -> list[tuple[str, ...]]:
    return record.lines_of(record.Comparison("b", "q", "old", "new"), rows)


def test_the_readme_shows_the_rows_and_is_short() -> None:
    text = record.README.read_text()
    assert text == record.with_table(text, run_all.COMPARISONS), "run_all.py --tables"
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_every_row_is_complete(path: Path) -> None:
    rows = record.read_rows(path)
    assert rows
    assert len({row.key for row in rows}) == len(rows)
    for found in rows:
        assert found.benchmark == path.stem
        assert found.benchmark in run_all.FULL
        texts = (found.case, found.variant, found.quantity, found.unit, found.machine)
        assert all(texts)
        assert found.command.startswith("python ")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)
        assert re.fullmatch(r"[0-9a-f]{7,40}", found.commit), "measured at a commit, not beside it"
        assert found.runs is not None
        assert found.runs >= 1
        assert (found.low is None) == (found.high is None)
        if found.low is not None and found.high is not None:
            assert found.low <= found.median <= found.high


def test_a_row_of_the_same_measurement_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "b.csv"
    record.write_rows(path, [row(), row(machine="n"), row(low=None, high=None, variant="new")])
    record.write_rows(path, [row(median=2.5, command="python x.py --steps 2")])
    found = record.read_rows(path)
    assert found[0] == row(median=2.5, command="python x.py --steps 2")
    assert found[1:] == [row(machine="n"), row(low=None, high=None, variant="new")]


def test_of_a_case_the_machine_measured_last_is_shown() -> None:
    old = [row(), row(variant="new", median=1.0)]
    later = [dataclasses.replace(r, machine="n", date="2026-01-02", median=8.0) for r in old]
    (line,) = lines(*later, *old)
    assert line[5:8] == ("1.00", "n", "2026-01-02")
    assert not lines(row(), row(variant="new", machine="n"))  # not beside one another


def test_the_ratio_says_how_many_times_better() -> None:
    one, other = row(median=4.0), row(variant="new", median=1.0)
    assert lines(one, other)[0][5] == "4.00"
    rates = [dataclasses.replace(r, unit="images/s") for r in (one, other)]
    assert lines(*rates)[0][5] == "0.25"
    assert lines(one, dataclasses.replace(other, date="2026-01-02"))[0][5] == ""  # another day


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="once each"):
        record.with_table("no markers", ())


def test_the_processor_is_named_with_its_generation() -> None:
    amd = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "cpu family": "25"}
    assert record.processor({**amd, "model": "1"}) == "AMD EPYC (Zen 3)"
    assert record.processor({**amd, "model": "17"}) == "AMD EPYC (Zen 4)"
    assert record.processor({**amd, "cpu family": "26", "model": "2"}) == "AMD EPYC (Zen 5)"
    intel = {"vendor_id": "GenuineIntel", "model name": "Intel Xeon", "flags": "sse avx512f"}
    assert record.processor(intel) == "Intel Xeon (AVX-512)"


def test_a_command_names_no_path_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/a/bench_x.py", "--out", "/b/x.csv", "--steps", "5", "--work=/c", "--cases", "32"]
    command = "python tests/benchmarks/bench_x.py --steps 5 --cases 32"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert record.command(arguments) == command
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which changes what is measured
    assert record.command(arguments) == f"OMP_NUM_THREADS=1 {command}"


def test_every_command_of_run_all_exists() -> None:
    assert run_all.FULL.keys() == run_all.QUICK.keys()
    for commands in (*run_all.FULL.values(), *run_all.QUICK.values()):
        for command in commands:
            assert (run_all.HERE / command.split()[0]).exists()
