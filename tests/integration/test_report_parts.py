"""The parts of the report that not every run has, and runs side by side."""

import json
from pathlib import Path

import pytest
import torch
from test_report import CLASSES, Page, remove, report, row, write_run
from upath import UPath

from ncfm import load
from pipeline.errors import UsageError
from pipeline.observe.preview import png, to_pixels
from pipeline.observe.reporting.compare import compare_command, write_comparison
from pipeline.observe.reporting.result_charts import confusion_chart
from pipeline.observe.snapshots import read_snapshots, snapshot_steps, write_snapshot

CONFUSION = [[8, 2, 0], [1, 9, 0], [3, 3, 4]]


def evaluated(directory: UPath, **extra: object) -> None:
    content = json.loads((directory / "evaluation.json").read_text())
    for entry in content["rows"]:
        if entry["set"] == "distilled":
            entry |= {"per_class": [0.8, 0.9, 0.4], "confusion": CONFUSION, **extra}
        entry["ci95"] = 0.05
    measure = {"set": "distilled", "network": "convnet", "hard_label_recovery": 0.29}
    measure |= {"improvement_over_random": 0.21, "label_robust_score": 0.2502}
    content |= {"protocol": "paper", "changes": ["evaluate.repeats"], "measures": [measure]}
    (directory / "evaluation.json").write_text(json.dumps(content))


def audited(directory: UPath) -> None:
    rows = [
        {
            "measure": measure,
            "better": "lower",
            "extractor": extractor,
            "set": name,
            "value": value,
            "std": {"random": 0.01, "noise": 0.00008}.get(name),
            "draws": 3,
        }
        for measure, extractor in (("ncfd", "convnet"), ("nearest_real", ""))
        for name, value in (("distilled", 0.1234), ("random", 0.25), ("noise", 1234.5))
    ]
    per_class = {"convnet": {"distilled": [0.1, 0.2, 0.3], "random": [0.2, 0.3, 0.4]}}
    content = {"rows": rows, "per_class_ncfd": per_class, "real_images": 300}
    (directory / "audit.json").write_text(json.dumps({**content, "images": {"distilled": 24}}))
    (directory / "audit").mkdir()
    (directory / "audit" / "nearest.png").write_bytes(png(to_pixels(torch.rand(3, 16, 64))))


def stepped(directory: UPath) -> None:
    """Snapshots, the last of them cut off."""
    distilled = load(directory / "distilled")
    images = {c: distilled.images[distilled.labels == c] for c in range(len(CLASSES))}
    target = directory / "snapshots" / "cafe"
    for step in (0, 5, 10):
        write_snapshot(target, step, images)
    write_snapshot(target, 20, {0: images[0]})
    stages = json.loads((directory / "stages.json").read_text())
    stages["distill"]["fingerprint"] = "cafe"
    (directory / "stages.json").write_text(json.dumps(stages))


def used(directory: UPath) -> None:
    row = {"set": "distilled", "steps": 2, "accuracy": [0.4, 0.6], "mean": 0.5, "std": 0.1}
    rows = [row | {"step": s, "classes": s + 1} for s in (1, 2)]
    (directory / "continual.json").write_text(json.dumps({"rows": rows}))
    sets = {"whole": {"mean": [0.7, 0.8, 0.9]}, "distilled": {"mean": [0.3, 0.5, 0.4]}}
    sets["distilled"] |= {"correlation": 0.5, "p_value": 0.6, "best_found": 0.8}  # type: ignore[dict-item]
    content = {"networks": ["<b>a", "b", "c"], "sets": sets}
    (directory / "search-proxy.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> UPath:
    directory = write_run(tmp_path_factory.mktemp("runs") / "full")
    best = [0.7, 0.7, 0.7]
    evaluated(directory, best_on_test=best, best_on_test_mean=0.7, best_on_test_std=0.0)
    audited(directory)
    stepped(directory)
    used(directory)
    return directory


@pytest.fixture(scope="module")
def page(full: UPath) -> Page:
    return report(full)


def test_accuracies_have_intervals_and_best_on_test_beside_the_last_epoch(page: Page) -> None:
    assert "Distilled 63.0 ± 3.6 58.0 to 68.0 70.0 ± 0.0 +21.0 2 convnet 3 30" in page.text
    assert "chosen on the test images themselves" in page.text
    assert "Protocol: paper, except for repeats." in page.text
    assert "+29.0 +21.0 0.250" in page.text
    assert "not comparable with the DD-Ranking leaderboard" in page.text


def test_several_networks_stand_side_by_side(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "networks")
    rows = [row(name, [0.1, 0.2]) for name in ("random", "distilled")]
    rows.append(row("distilled", [0.3, 0.4], network="vgg11"))
    (directory / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = report(directory).text
    dash = "\N{EN DASH}"
    assert "Accuracy, % convnet vgg11 Distilled 15.0 ± 7.1 35.0 ± 7.1" in text
    assert f"Random images 15.0 ± 7.1 {dash} In full" in text


def test_best_and_worst_classes_with_what_they_are_taken_for(page: Page) -> None:
    assert "dog 90.0 %; most often predicted as cat (10 %)" in page.text
    assert "tench, Tinca tinca 40.0 %; most often predicted as dog (30 %)" in page.text
    figure = next(f for f in page.figures() if f["data"][0]["type"] == "heatmap")
    assert figure["data"][0]["z"] == [[0.8, 0.2, 0], [0.1, 0.9, 0], [0.3, 0.3, 0.4]]


def test_the_slider_has_a_picture_for_every_whole_snapshot(page: Page) -> None:
    (slider,) = page.all("input", type="range")
    assert slider["max"] == "2"
    frames = [a for a in page.all("figure") if "data-step" in a]
    assert [a["data-step"] for a in frames] == [f"step {s} of 10" for s in (0, 5, 10)]
    assert ["hidden" in a for a in frames] == [False, True, False]  # without a script: both ends


def test_fidelity_stands_beside_its_references(page: Page) -> None:
    dash = "\N{EN DASH}"
    cells = f"{dash} 0.123 0.25 ± 0.01 {dash} {dash} 1230 ± 0.00008"
    assert f"NCFD, mean of the classes lower is better {cells}" in page.text
    assert "the 24 training images of the distilled set are to all 300 real ones" in page.text
    assert any(a["alt"].startswith("Distilled images above") for a in page.all("img"))


def test_uses_are_drawn_and_names_stay_text(page: Page) -> None:
    assert "Rank correlation with the whole set: Distilled +0.50." in page.text
    assert "reaches on the whole one: Distilled 80.0 %; the best of all: 90.0 %." in page.text
    assert "Bars: standard deviation over 2 orders of the classes." in page.text
    assert "After the last step: Distilled 50.0 %." in page.text
    texts = [t for f in page.figures() for trace in f["data"] for t in trace.get("text", [])]
    assert "&lt;b&gt;a" in texts


def test_a_run_without_the_parts_has_a_report(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "plain")).text
    parts = ("Fidelity", "Uses", "Confusion", "Best on test", "interval", "Protocol", "first step")
    for part in parts:
        assert part not in text


def test_snapshots_read_back(tmp_path: Path) -> None:
    images = {c: torch.rand(2, 1, 6, 6) for c in range(3)}
    write_snapshot(UPath(tmp_path), 7, images)
    (found,) = read_snapshots(UPath(tmp_path), 3)
    assert found.step == 7
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.cat([images[c] for c in range(3)]).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found.images, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert read_snapshots(UPath(tmp_path / "nowhere"), 3) == []


@pytest.mark.parametrize("steps", [1, 6, 20_000])
def test_snapshots_begin_and_end_with_the_run(steps: int) -> None:
    kept = snapshot_steps(steps)
    assert {0, steps} <= kept
    assert len(kept) <= 9
    early = [step for step in kept if step <= steps / 2]
    assert len(early) >= len(kept) / 2


def test_confusion_of_a_class_without_images() -> None:
    figure = confusion_chart([[0, 0], [1, 1]], ["a", "b"]).figure
    assert figure["data"][0]["z"] == [[0, 0], [0.5, 0.5]]


def test_runs_side_by_side(full: UPath, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    config = (other / "config.toml").read_text().replace("lr = 0.01", "lr = 0.5")
    (other / "config.toml").write_text(config)
    rows = [row("distilled", [0.1, 0.2]), row("distilled", [0.3, 0.4], network="vgg11")]
    (other / "evaluation.json").write_text(json.dumps({"rows": rows}))
    path = compare_command([str(full), str(other), "--output", str(tmp_path / "page.html")])
    page = Page(path.read_text())
    dash = "\N{EN DASH}"
    assert "Distilled, convnet 63.0 ± 3.6 (3) 15.0 ± 7.1 (2)" in page.text
    assert f"Distilled, vgg11 {dash} 35.0 ± 7.1 (2)" in page.text
    assert "distill.lr 0.01 0.5" in page.text
    assert "seed" not in page.text  # the same in both
    assert f"NCFD, mean of the classes, convnet 0.123 {dash}" in page.text
    ncfd = next(f for f in page.figures() if len(f["data"]) == 2)
    assert [trace["name"] for trace in ncfd["data"]] == ["full", "other"]
    assert len(ncfd["data"][0]["x"]) == 10


def test_a_comparison_needs_two_runs(full: UPath, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two runs or more"):
        compare_command([str(full)])
    with pytest.raises(UsageError, match=r"no config\.toml"):
        write_comparison([full, UPath(tmp_path)], UPath(tmp_path / "page.html"))
    with pytest.raises(UsageError, match="--fast"):
        compare_command([str(full), "--fast"])


def test_runs_of_one_name_are_told_apart(full: UPath, tmp_path: Path) -> None:
    twin = write_run(tmp_path / "full")
    remove(twin / "metrics.jsonl")
    page = Page(write_comparison([full, twin], UPath(tmp_path / "c.html")).read_text())
    assert f"1: {full}" in page.text
    assert f"2: {twin}" in page.text
