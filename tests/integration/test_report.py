"""The report of a run directory: complete, self-contained, safe, the same every time."""

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

from ncfm import SyntheticSet, load
from ncfm.images import ImageSpec
from pipeline.observe.reporting.gallery import MAX_CLASSES, gallery
from pipeline.observe.reporting.report import write_report

NOON = datetime(2030, 1, 2, 12, 0, 0, tzinfo=UTC)
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
CLASSES = ("cat", "dog", "tench, Tinca tinca")
CONFIG = 'name = "trial"\nstorage_path = "runs"\nseed = 7\n\n[distill]\nlr = 0.01\n'
PROVENANCE = {
    "command": "python pipeline/run.py --distill.lr 0.01",
    "config": {"seed": 7},
    "seed": 7,
    "versions": {"torch": "2.99.1", "git": "0123456789" * 4 + "-dirty"},
    "inputs": {"shards": "feedbeefdeadcafe"},
}


def synthetic(
    generator: torch.Generator,
    names: tuple[str, ...] = CLASSES,
    *,
    ipc: int = 2,
    channels: int = 3,
    size: int = 8,
) -> SyntheticSet:
    images = torch.rand((len(names) * ipc, channels, size, size), generator=generator)
    spec = ImageSpec(
        channels=channels,
        image_size=size,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        class_names=names,
    )
    return SyntheticSet(
        images, torch.arange(len(names)).repeat_interleave(ipc), 2, spec, PROVENANCE
    )


def row(name: str, accuracy: list[float], ipc: int = 2, network: str = "convnet") -> dict:
    mean, std = float(np.mean(accuracy)), float(np.std(accuracy, ddof=1))
    return {
        "set": name,
        "network": network,
        "images_per_class": ipc,
        "accuracy": accuracy,
        "mean": mean,
        "std": std,
        "epochs": 30,
    }


def write_run(directory: Path, names: tuple[str, ...] = CLASSES) -> UPath:
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(CONFIG)
    for part in ("initial", "distilled"):
        synthetic(generator, names).save(directory / part)
    rows: list[dict] = [
        {
            "stage": "pretrain",
            "network": n,
            "epoch": e,
            "time": 0.0,
            "pretrain/accuracy": 0.2 + 0.3 * e,
        }
        for n in range(2)
        for e in range(3)
    ]
    rows += [
        {
            "stage": "distill",
            "step": s,
            "time": 0.0,
            "distill/ncfd": 1 / s,
            "distill/psi_objective": 0.123456,
            "distill/brand_new": 5.0,
        }
        for s in range(10, 101, 10)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluation = [
        row("whole", [0.9, 0.92, 0.94], ipc=100),
        row("random", [0.40, 0.42, 0.44]),
        row("random_same_factor", [0.38, 0.40, 0.42]),
        row("distilled", [0.60, 0.62, 0.67]),
    ]
    (directory / "evaluation.json").write_text(json.dumps({"rows": evaluation}))
    stages = {
        "distill": {"seconds": 125.0, "peak_rss_bytes": 3 * 2**30, "reused": False},
        "shard": {"seconds": 1.5, "peak_rss_bytes": 2**29, "reused": True},
    }
    (directory / "stages.json").write_text(json.dumps(stages))
    return UPath(directory)


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text outside of code."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag if tag in ("script", "style") else self.inside
        if tag == "script":
            self.scripts.append("")
        elif tag in ("tr", "td", "th"):
            self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]

    def figures(self) -> list[dict]:
        return [json.loads(a["data-figure"]) for a in self.all("div", **{"class": "chart"})]


def report(directory: UPath) -> Page:
    return Page(write_report(directory, now=NOON).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> UPath:
    return write_run(tmp_path_factory.mktemp("runs") / "trial")


@pytest.fixture(scope="module")
def page(run_directory: UPath) -> Page:
    return report(run_directory)


def test_images_before_and_after_are_the_stored_pixels(page: Page, run_directory: UPath) -> None:
    shown = page.all("img")
    assert len(shown) == 2 * len(CLASSES) * 2
    assert all(image["src"].startswith("data:image/png;base64,") for image in shown)
    for part, when in (("initial", "before"), ("distilled", "after")):
        stored = load(run_directory / part).images
        mine = [image for image in shown if f", {when} distillation" in image["alt"]]
        assert [a["alt"].rsplit(", image", 1)[0] for a in mine] == [
            n for n in CLASSES for _ in "12"
        ]
        for attributes, expected in zip(mine, stored, strict=True):
            data = base64.b64decode(attributes["src"].partition(",")[2])
            pixels = np.asarray(Image.open(io.BytesIO(data)))
            assert (
                np.abs(pixels / 255 - expected.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
            )


def test_table_states_mean_spread_and_gain(page: Page) -> None:
    assert "Distilled 63.0 ± 3.6 +21.0 2 convnet 3 30" in page.text
    assert f"Random images 42.0 ± 2.0 {DASH} 2 convnet 3 30" in page.text
    assert f"Random images, same factor 40.0 ± 2.0 {MINUS}2.0" in page.text
    assert f"Whole training set 92.0 ± 2.0 {DASH} 100" in page.text


def test_gain_compares_like_with_like(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    rows = [
        row("random", [0.1, 0.1]),
        row("distilled", [0.5, 0.5], network="resnet18"),
        row("distilled", [0.4, 0.4], ipc=50),
    ]
    (directory / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = report(directory).text
    assert f"Distilled, 2 per class, resnet18 50.0 ± 0.0 {DASH}" in text
    assert f"Distilled, 50 per class, convnet 40.0 ± 0.0 {DASH}" in text


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    single = {**row("distilled", [0.5, 0.5]), "accuracy": [0.5], "std": 0.0}
    (directory / "evaluation.json").write_text(json.dumps({"rows": [single]}))
    text = report(directory).text
    assert f"Distilled 50.0 {DASH} 2 convnet 1 30" in text
    assert "50.0 ±" not in text


def test_curves_hold_what_was_logged(page: Page) -> None:
    traces = [trace for figure in page.figures() for trace in figure["data"]]
    steps = list(range(10, 101, 10))
    assert any(
        t["x"] == steps and t["y"] == pytest.approx([1 / s for s in steps], rel=1e-5)
        for t in traces
    )
    assert any(t["y"] == [0.123456] * 10 for t in traces)
    assert sum(t["y"] == pytest.approx([20, 50, 80]) for t in traces) == 2  # both networks
    assert "brand new" in page.text  # a metric that this version does not know


def test_a_resumed_run_shows_the_later_row_of_a_step(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    rows = [(1, 9.0), (2, 8.0), (2, 7.0), (3, float("nan"))]
    (directory / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"stage": "distill", "step": s, "distill/ncfd": v}) + "\n" for s, v in rows
        )
    )
    ys = [trace["y"] for figure in report(directory).figures() for trace in figure["data"]]
    assert [9.0, 7.0] in ys


def test_cost_configuration_and_provenance(page: Page) -> None:
    assert "shard reused 1.5 s 512 MiB distill 2 min 05 s 3.00 GiB all 2 min 06 s" in page.text
    assert "[distill] lr = 0.01" in page.text
    (link,) = page.all("a", download="config.toml")
    assert base64.b64decode(link["href"].partition(",")[2]).decode() == CONFIG
    for fact in (
        "python pipeline/run.py --distill.lr 0.01",
        "git checkout " + "0123456789" * 4,
        "python pipeline/run.py --config config.toml --name trial-again",
        "uncommitted changes",
        "torch 2.99.1",
        "feedbeefdeadcafe",
        "seed 7",
        "2030-01-02 12:00:00 UTC",
    ):
        assert fact in page.text, fact


def test_nothing_is_loaded_from_elsewhere(page: Page, run_directory: UPath) -> None:
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]
    source = (run_directory / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"plotly\.js v\d", source)) == 1
    # plotly.js offers to upload charts; the page must not.
    assert "showSendToCloud: false" in page.scripts[-1]
    (style,) = re.findall(r"<style>\n(.*?)</style>", source, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_readable_everywhere(page: Page) -> None:
    (viewport,) = page.all("meta", name="viewport")
    assert "width=device-width" in viewport["content"]
    assert page.all("html", lang="en")
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(a["aria-label"] for a in page.all("div", **{"class": "chart"}))


HOSTILE = (
    "<b>bold</b>",
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", HOSTILE)
    rows = [row(name, [0.5, 0.6], network=name) for name in HOSTILE]
    (directory / "evaluation.json").write_text(json.dumps({"rows": rows}))
    metric = {"stage": "distill", "step": 1, f"distill/{HOSTILE[1]}": 1.0}
    (directory / "metrics.jsonl").write_text(json.dumps(metric) + "\n")
    (directory / "config.toml").write_text(f"name = '''{HOSTILE[2]}'''\n")
    manifest = json.loads((directory / "distilled" / "manifest.json").read_text())
    manifest["provenance"] |= {"command": HOSTILE[1], "versions": {HOSTILE[0]: HOSTILE[2]}}
    (directory / "distilled" / "manifest.json").write_text(json.dumps(manifest))

    hostile, harmless = report(directory), report(write_run(tmp_path / "other"))
    assert not hostile.all("b")
    assert len(hostile.scripts) == len(harmless.scripts)
    assert all(image["src"].startswith("data:") for image in hostile.all("img"))
    assert not any("onerror" in attributes for _, attributes in hostile.elements)
    for name in HOSTILE:
        assert name in hostile.text
    for figure in hostile.figures():  # plotly reads HTML in its texts, too
        for trace in figure["data"]:
            texts = [*trace.get("text", []), *(y for y in trace["y"] if isinstance(y, str))]
            assert not any("<" in text.replace("<br>", "") for text in texts)


@pytest.mark.parametrize(
    ("lost", "stage"),
    [
        ("initial", " distill"),
        ("metrics.jsonl", " pretrain"),
        ("evaluation.json", " evaluate"),
        ("stages.json", ""),
    ],
)
def test_says_what_is_missing_and_how_to_make_it(tmp_path: Path, lost: str, stage: str) -> None:
    directory = write_run(tmp_path / "run")
    remove(directory / lost)
    page = report(directory)
    assert lost in page.text
    assert f"python pipeline/run.py{stage} --config runs/trial/config.toml" in page.text


def test_nothing_missing_nothing_said(page: Page) -> None:
    assert "Not in this report" not in page.text


def test_a_bare_distilled_set_has_a_report_without_scripts(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    for lost in ("initial", "metrics.jsonl", "evaluation.json", "stages.json"):
        remove(directory / lost)
    page = report(directory)
    assert not page.scripts
    assert len(page.all("img")) == 2 * len(CLASSES)


@pytest.mark.parametrize("lost", ["config.toml", "distilled"])
def test_names_what_it_cannot_do_without(tmp_path: Path, lost: str) -> None:
    directory = write_run(tmp_path / "run")
    remove(directory / lost)
    with pytest.raises(FileNotFoundError, match=r"python pipeline/run\.py"):
        write_report(directory)
    assert not (directory / "report.html").exists()


def test_same_input_same_report_but_for_its_time(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    first = write_report(directory, now=NOON).read_bytes()
    assert write_report(directory, now=NOON).read_bytes() == first
    later = write_report(directory, now=NOON.replace(year=2031)).read_bytes()
    assert later != first
    assert later.replace(b"2031-01-02", b"2030-01-02") == first


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    old = write_report(directory, now=NOON).read_bytes()
    data = directory / "distilled" / "synthetic.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="synthetic"):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == old
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("classes", "ipc", "size"), [(2, 500, 4), (MAX_CLASSES + 20, 1, 4), (3, 60, 512)]
)
def test_gallery_says_what_it_leaves_out(classes: int, ipc: int, size: int) -> None:
    names = tuple(f"class {c}" for c in range(classes))
    spec = ImageSpec(channels=1, image_size=size, mean=(0.5,), std=(0.2,), class_names=names)
    images = torch.zeros(()).expand(classes * ipc, 1, size, size)
    many = SyntheticSet(images, torch.arange(classes).repeat_interleave(ipc), 1, spec)
    shown = gallery(None, many)
    total = sum(len(entry.after) for entry in shown.classes)
    assert total < classes * ipc
    assert f"{len(shown.classes)} of {classes} classes, {total} of {classes * ipc} images" in (
        shown.left_out
    )


def test_gallery_of_greyscale_images_shows_all() -> None:
    grey = synthetic(torch.Generator().manual_seed(1), channels=1, size=7)
    shown = gallery(grey, grey)
    assert shown.left_out == ""
    assert [len(entry.before) for entry in shown.classes] == [2, 2, 2]
    assert shown.width % 7 == 0
    soft = dataclasses.replace(grey, labels=torch.zeros(6, dtype=torch.long))
    assert [len(entry.after) for entry in gallery(None, soft).classes] == [6, 0, 0]


def remove(path: UPath) -> None:
    act: Callable[[UPath], object] = shutil.rmtree if path.is_dir() else UPath.unlink
    act(path)
