"""Distribution changes the speed and nothing else: real processes, gloo, no Ray.

One set of four processes, started once, runs all the cases: to import torch costs more than any of
them. The reference is one worker, in this process.
"""

import dataclasses
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distill import EVERYTHING, FREQUENCIES, initial, make, real_batch
from torch import Tensor

from ncfm.distill import DistillConfig, Distiller
from pipeline.runtime.assignment import ClassCost, Group, assign
from pipeline.runtime.collectives import CollectiveError, Collectives, predicted_bytes
from pipeline.runtime.workers import current_context

WORLD = 4
STEPS = 30
# Where no class is shared, the results are the same bits. Else: a step of AdamW has the size of lr
# even where a gradient is nothing but rounding; float32 images of two runs then part by about lr,
# which is why lr is far above the tolerance. With these seeds they differ by 4e-7.
CONFIG = dataclasses.replace(EVERYTHING, lr=2e-3, num_steps=STEPS)

FEW = "fewer images than members"
EQUAL = ClassCost(shared=12, own=24)
CASES: dict[str, tuple[tuple[Group, ...], int]] = {  # groups, real images a class
    **{f"5 classes on {n}": (assign([EQUAL] * 5, n), 12) for n in (2, 3, 4)},
    "2 classes on 4": (assign([EQUAL] * 2, 4), 12),
    "5 classes, shared by 3": ((Group((0, 1, 2), (0, 1, 2, 3, 4)),), 12),
    "uneven groups": ((Group((0, 1, 2), (1, 3)), Group((3,), (0, 2, 4))), 12),
    FEW: ((Group((0, 1, 2, 3), (0, 1)),), 2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"config": dataclasses.replace(CONFIG, precision="float64")},
    "mmd": {
        "config": dataclasses.replace(CONFIG, precision="float64", objective="mmd", real_batch=7),
        "frequencies": dataclasses.replace(FREQUENCIES, sampler="gaussian"),
    },
    "ascents": {
        "config": dataclasses.replace(CONFIG, precision="float64"),
        "frequencies": dataclasses.replace(FREQUENCIES, ascents=2, per_network=True),
    },
    "between": {
        "config": dataclasses.replace(CONFIG, precision="float64"),
        "frequencies": dataclasses.replace(FREQUENCIES, objective="between_classes", ascents=2),
    },
    "median": {
        "config": dataclasses.replace(CONFIG, precision="float64"),
        "frequencies": dataclasses.replace(FREQUENCIES, sampler="imq", bandwidth="median"),
    },
}
# Two real images leave psi's objective next to a pole (a sampling floor near zero), which magnifies
# rounding a million times: that case is compared in float64 alone.
RUNS = [
    (case, v) for case in CASES for v in ("float32", "float64") if (case, v) != (FEW, "float32")
]
RUNS += [
    (case, variant)
    for case in ("2 classes on 4", "uneven groups")
    for variant in ("mmd", "ascents")
]
RUNS += [("uneven groups", variant) for variant in ("median", "between")]


def classes_of(case: str) -> list[int]:
    return sorted(c for group in CASES[case][0] for c in group.classes)


def distil(
    case: str, variant: str, classes: tuple[int, ...], communicator: Collectives | None = None
) -> tuple[Distiller, dict[str, float]]:
    """30 steps; the distiller and the sums of its metrics."""
    settings = {"config": CONFIG, **VARIANTS[variant]}
    distiller = make(
        classes, num_classes=len(classes_of(case)), communicator=communicator, **settings
    )
    metrics: dict[str, float] = {}
    for _ in range(STEPS):
        real = {c: real_batch(c, distiller.step)[: CASES[case][1]] for c in classes}
        for name, value in distiller.update(real).items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return distiller, metrics


def work(rank: int, folder: Path) -> None:
    """One of the processes: all cases, one after the other."""
    torch.set_num_threads(1)
    for number, (case, variant) in enumerate(RUNS):
        groups, _ = CASES[case]
        workers = sum(len(group.ranks) for group in groups)
        if rank < workers:
            meet(rank, workers, folder / f"meeting-{number}")
            collectives = Collectives(current_context(), groups, timeout_s=60)
            mine = next(group for group in groups if rank in group.ranks)
            distiller, metrics = distil(case, variant, mine.classes, collectives)
            result = {"state": distiller.state_dict(), "metrics": metrics}
            torch.save({**result, "sent": collectives.bytes_sent}, folder / f"{number}-{rank}.pt")
            dist.destroy_process_group()
    drift(rank, folder)
    stay_away(rank, folder)


def drift(rank: int, folder: Path) -> None:
    """Ranks 0, 1 and 2 share class 0, ranks 1 and 2 class 1, all psi; some differ."""
    meet(rank, WORLD, folder / "meeting-drift")
    collectives = Collectives(
        current_context(), [Group((r,), (r,)) for r in range(WORLD)], timeout_s=60
    )
    state = {"psi": torch.ones(2), f"own/{rank}": torch.full((2,), float(rank))}
    if rank < 3:
        state["class/0"] = torch.arange(4.0)
    if rank in (1, 2):
        state["class/1"] = torch.arange(3.0)
    same = collectives.agree(state)
    if rank == 2:
        state["class/0"] = state["class/0"] + 2.0**-20
        state["class/1"] = state["class/1"] + 2.0**-20
    if rank == 3:
        state["psi"] = torch.zeros(2)
    torch.save((same, collectives.agree(state)), folder / f"drift-{rank}.pt")
    dist.destroy_process_group()


def meet(rank: int, workers: int, file: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)


def stay_away(rank: int, folder: Path) -> None:
    """Rank 2 stays away from a sum; the others tell so."""
    meet(rank, WORLD, folder / "meeting-last")
    groups = [Group((r,), (r,)) for r in range(WORLD)]
    collectives = Collectives(current_context(), groups, timeout_s=5)
    if rank != 2:
        with pytest.raises(CollectiveError) as caught:
            collectives.sum_all(torch.ones(1))
        (folder / f"missing-{rank}.txt").write_text(str(caught.value))
    (folder / f"done-{rank}").touch()
    while len(list(folder.glob("done-*"))) < WORLD:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("forkserver")
    # Imported once, then forked. torch's optimisers import the last one when they are made.
    context.set_forkserver_preload(
        ["ncfm.distill", "pipeline.runtime.collectives", "torch._dynamo"]
    )
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
    assert [process.exitcode for process in processes] == [0] * WORLD
    return folder


def load(folder: Path, run: tuple[str, str]) -> list[dict[str, Any]]:
    """What every worker of a run has, by rank."""
    paths = sorted(folder.glob(f"{RUNS.index(run)}-*.pt"))
    return [torch.load(path) for path in paths]


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_as_many_workers_as_one(results: Path, run: tuple[str, str]) -> None:
    """Psi, augmentation and calibration on, after 30 steps."""
    case, variant = run
    distiller, metrics = distil(case, variant, tuple(classes_of(case)))
    expected, workers = distiller.state_dict(), load(results, run)
    tolerance = 1e-4 if variant == "float32" else 1e-9
    shared = any(len(group.ranks) > 1 for group in CASES[case][0])  # else bit for bit
    seen = set()
    for worker in workers:
        for key, value in worker["state"].items():
            if key.endswith("images") or key.startswith("psi/"):
                # Adam divides a gradient by its own size: rounding in a small one of psi grows.
                grows = (100 if case == FEW else 10) if key.startswith("psi/") else 1
                allowed = tolerance * grows * shared
                torch.testing.assert_close(value, expected[key], atol=allowed, rtol=0)
                seen.add(key)
    assert {f"class/{c}/images" for c in classes_of(case)} <= seen
    for name, value in metrics.items():  # each class counted once, however many share it
        total = sum(worker["metrics"][name] for worker in workers)
        assert total == pytest.approx(value, rel=1e-3)
    for c in classes_of(case):  # negative control: there was something to agree on
        moved = (expected[f"class/{c}/images"] - initial(c)).abs().max()
        assert moved > 100 * tolerance


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_members_of_a_group_are_alike_bit_for_bit(results: Path, run: tuple[str, str]) -> None:
    workers = load(results, run)
    for group in CASES[run[0]][0]:
        first: dict[str, Tensor] = workers[group.ranks[0]]["state"]
        for rank in group.ranks[1:]:
            assert all(torch.equal(first[k], v) for k, v in workers[rank]["state"].items())


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_the_formula_of_the_bytes(results: Path, run: tuple[str, str]) -> None:
    case, variant = run
    settings: dict[str, Any] = {"config": CONFIG, "frequencies": FREQUENCIES, **VARIANTS[variant]}
    config: DistillConfig = settings["config"]
    sent = sum(worker["sent"] for worker in load(results, run))
    if config.objective == "mmd":  # D + 1 numbers in the place of 2 K + 1
        shared = sum((len(g.ranks) - 1) * len(g.classes) for g in CASES[case][0])
        assert sent == pytest.approx(STEPS * 2 * 8 * shared * 33)
        return
    size = 4 if config.precision == "float32" else 8
    one_step = predicted_bytes(CASES[case][0], settings["frequencies"], dim=32, number_bytes=size)
    if variant == "median":  # the mean, and the distance of each of 12 images from it
        shared = sum((len(g.ranks) - 1) * len(g.classes) for g in CASES[case][0])
        one_step += 2 * 8 * shared * (33 + 12)
    assert sent == pytest.approx(STEPS * one_step)


def test_nothing_crosses_without_psi_and_groups() -> None:
    fixed = dataclasses.replace(FREQUENCIES, sampler="gaussian")
    assert predicted_bytes(assign([EQUAL] * 5, 4), fixed, dim=32) == 0


def test_values_that_drifted_apart_are_the_first_owners_again(results: Path) -> None:
    shared = {"class/0": ((0, 1, 2), torch.arange(4.0)), "class/1": ((1, 2), torch.arange(3.0))}
    for rank in range(WORLD):
        (same, none), (state, drifted) = torch.load(results / f"drift-{rank}.pt")
        expected = {"psi": torch.ones(2), f"own/{rank}": torch.full((2,), float(rank))}
        expected |= {key: value for key, (ranks, value) in shared.items() if rank in ranks}
        assert none == {}
        assert drifted == {"class/0": [2], "class/1": [2], "psi": [3]}
        for found in (same, state):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_who_did_not_come_is_named(results: Path) -> None:
    texts = [(results / f"missing-{rank}.txt").read_text() for rank in (0, 1, 3)]
    assert all("a sum over the workers failed" in text for text in texts)
    assert "Ranks 2 failed" in texts[0]  # rank 0 counts
