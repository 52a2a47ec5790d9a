"""Uses of a distilled set: class-incremental memory, proxy of a search, exports."""

import json
import re
from pathlib import Path

import golden
import pytest
import torch
from tiny import copied, stage
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import ncfm
from ncfm.evaluate import train_and_test
from ncfm.images import InMemoryImages
from ncfm.models import ModelConfig
from ncfm.train import TrainConfig
from pipeline.errors import UsageError
from pipeline.stages.continual import CONTINUAL_VERSION, ContinualConfig, moments
from pipeline.stages.search_proxy import SEARCH_PROXY_VERSION, proxy_content, rank_correlation

SETS = ("distilled", "random", "random_same_factor", "herding")


def test_classes_come_once_each_in_an_order_of_the_repeat() -> None:
    found = moments(10, ContinualConfig(steps=(5, 3), repeats=2), seed=0)
    assert len(found) == 2 * (5 + 3)
    for moment in found:
        assert len(set(moment.classes)) == len(moment.classes)
    last = {(m.steps, m.repeat): m.classes for m in found if m.step == m.steps}
    assert all(sorted(classes) == list(range(10)) for classes in last.values())
    assert last[5, 0] == last[3, 0] != last[5, 1]
    sizes = [len(m.classes) for m in found if (m.steps, m.repeat) == (3, 0)]
    assert sizes == [4, 7, 10]
    with pytest.raises(ValueError, match="11 is more than the 10 classes"):
        moments(10, ContinualConfig(steps=(11,)), seed=0)


def test_continual_learning_sees_more_classes_at_each_step(tiny: tuple[Path, Path]) -> None:
    folder, directory = copied(tiny, "continual")
    options = ["--continual.steps", "[2,5]", "--continual.repeats", "1"]
    stage(folder, directory, "continual", *options)
    rows = json.loads((directory / "continual.json").read_text())["rows"]
    mine = [row for row in rows if row["set"] == "distilled"]
    assert [(row["steps"], row["classes"]) for row in mine] == [
        (2, 5), (2, 10), (5, 2), (5, 4), (5, 6), (5, 8), (5, 10),
    ]  # fmt: skip
    # All classes seen: the same networks, whatever the steps before.
    ends = [row["accuracy"] for row in mine if row["classes"] == 10]
    assert ends[0] == ends[1]
    accuracies = {n: [v for r in rows if r["set"] == n for v in r["accuracy"]] for n in SETS}
    golden.check("continual", CONTINUAL_VERSION, accuracies, tolerance=0.05)
    assert {row["set"] for row in rows} == set(SETS)
    assert stage(folder, directory, "continual", *options)["reused"]
    with pytest.raises(UsageError, match=r"continual\.steps 11"):
        stage(folder, directory, "continual", "--continual.steps", "[11]")


def test_search_proxy_correlates_with_the_whole_set(tiny: tuple[Path, Path]) -> None:
    folder, directory = copied(tiny, "searched")
    grid = ["--search_proxy.widths", "[4]", "--search_proxy.depths", "[1,2,3]"]
    stage(folder, directory, "search-proxy", *grid, "--search_proxy.norms", '["instance"]')
    found = json.loads((directory / "search-proxy.json").read_text())
    assert found["networks"] == [f"depth {d}, width 4, instance norm" for d in (1, 2, 3)]
    assert set(found["sets"]) == {"distilled", "random", "random_same_factor", "whole"}
    for entry in found["sets"].values():
        assert len(entry["mean"]) == 3
    means = {name: entry["mean"] for name, entry in found["sets"].items()}
    golden.check("search-proxy", SEARCH_PROXY_VERSION, means, tolerance=0.05)
    assert found["sets"]["distilled"]["best_found"] in found["sets"]["whole"]["mean"]
    with pytest.raises(UsageError, match="at least 3 architectures"):
        stage(folder, directory, "search-proxy", *grid[:2], "--search_proxy.depths", "[1]",
              "--search_proxy.norms", '["none"]')  # fmt: skip


def test_rank_correlation_is_of_ranks() -> None:
    x = [0.1, 0.2, 0.3, 0.4]
    assert rank_correlation(x, [1, 4, 9, 16]) == pytest.approx((1.0, 0.0))
    assert rank_correlation(x, [4.0, 3.0, 2.0, 1.0])[0] == pytest.approx(-1)
    # By hand: 1 - 6 sum d^2 / (n (n^2 - 1)), d = (0, 1, 1, 0)
    assert rank_correlation(x, [1, 3, 2, 4])[0] == pytest.approx(1 - 12 / 60)
    assert rank_correlation(x, [1, 1, 1, 1]) == (None, None)


def test_the_proxys_choice_is_judged_on_the_whole_set() -> None:
    models = [ModelConfig(depth=d) for d in (1, 2, 3)]
    found = proxy_content(
        models,
        {"distilled": [[0.3], [0.5], [0.4]], "whole": [[0.7], [0.8], [0.9]]},
    )
    assert found["sets"]["distilled"]["best_found"] == 0.8
    assert found["sets"]["distilled"]["correlation"] == pytest.approx(0.5)


def test_an_exported_set_trains_as_the_loaded_one(
    tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNG rounds to 8 bits; three runs of each, within their noise."""
    folder, directory = copied(tiny, "exported")
    push = ("--to", "imagefolder", "--push=me/tiny")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="environment variable HF_TOKEN"):
        stage(folder, directory, "export", *push)
    stage(folder, directory, "export", *push, "--export.dry_run", "true")
    assert re.search(
        r"would upload 43 files, [\d,]+ bytes, to the data set me/tiny", capsys.readouterr().out
    )
    loaded = ncfm.load(directory / "distilled")
    assert ncfm.load(directory / "export" / "imagefolder").images.equal(loaded.images)
    files = ImageFolder(str(directory / "export" / "imagefolder" / "train"))
    assert tuple(files.classes) == tuple(sorted(loaded.class_names))
    order = [loaded.class_names.index(name) for name in files.classes]
    images = torch.stack([to_tensor(files.loader(path)) for path, _ in files.samples])
    labels = torch.tensor([order[label] for _, label in files.samples])
    by_name = torch.tensor([int(Path(path).stem) for path, _ in files.samples]).argsort()
    initial = ncfm.load(directory / "initial")  # images of the same classes to be tested on
    model, training = ModelConfig(depth=2, width=8), TrainConfig(epochs=8, lr=0.05)
    found = [
        [
            train_and_test(
                InMemoryImages(*data),
                InMemoryImages(*initial.decode()),
                loaded.spec,
                model=model,
                training=training,
                seed=seed,
            ).accuracy
            for seed in range(3)
        ]
        for data in (loaded.decode(), (images[by_name], labels[by_name]))
    ]
    means = [sum(runs) / 3 for runs in found]
    assert abs(means[0] - means[1]) <= 0.05
