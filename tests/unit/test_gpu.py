"""What the CPU would wait for a GPU for, on a fake one (fake_gpu.py): meanwhile a GPU idles.

That the numbers are right on a real one is test_reference.py's to say.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).with_name("fake_gpu.py")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(FAKE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    findings: dict[str, Any] = json.loads(done.stdout)
    return findings


def test_the_fake_notes_what_waits_and_refuses_what_mixes_devices(found: dict[str, Any]) -> None:
    """Negative controls: each of them waits on a GPU."""
    assert {name: len(waits) > 0 for name, waits in found["controls"].items()} == dict.fromkeys(
        ("item", "tolist", "bool", "cpu", "to", "tensor", "new_tensor", "index", "put", "copy"),
        True,
    )
    assert found["mixing_fails"]


def test_a_step_waits_only_for_the_losses_to_be_finite(found: dict[str, Any]) -> None:
    steps = found["steps"]
    assert len(steps) == 7
    assert all(set(waits) == {"_check_finite"} for waits in steps.values()), steps


def test_training_waits_no_more_often_for_more_batches(found: dict[str, Any]) -> None:
    for source in ("training", "training on decoded"):
        few, many = found[source]
        assert 0 < len(few) == len(many)


def test_pools_live_on_the_gpu_where_they_fit_and_wait_for_nothing(found: dict[str, Any]) -> None:
    assert found["pools"] == {
        "resident": [["cuda"], []],
        "too large": [["cpu"], []],
    }
