"""The pages in a headless browser: charts are drawn, nothing is complained about.

Their content security policy refuses every request, and what it refuses is on the console: a silent
console is a page that asks the network for nothing.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import write_run
from test_report_parts import audited, evaluated, stepped, used
from upath import UPath

from pipeline.observe.reporting.compare import write_comparison
from pipeline.observe.reporting.report import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page's elements after its scripts have run, and what is on its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={folder}", "--enable-logging=stderr"]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--virtual-time-budget=8000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_report_and_comparison_load_in_silence(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "full")
    evaluated(directory)
    audited(directory)
    stepped(directory)
    used(directory)
    report = Path(str(write_report(directory)))
    plain = write_run(tmp_path / "plain")
    comparison = write_comparison([directory, plain], UPath(tmp_path / "compare.html"))
    for page in (report, Path(str(comparison))):
        elements, console = browse(page, tmp_path / "browser")
        assert console == []
        drawn = elements.count('class="user-select-none svg-container"')
        assert drawn == elements.count('data-figure="') > 0
    elements, _ = browse(report, tmp_path / "browser")
    assert "step 10 of 10</output>" in elements  # the slider's script ran


def test_a_broken_page_is_heard(tmp_path: Path) -> None:
    """Negative control: an exception, and a picture from elsewhere under the same policy."""
    rules = "default-src 'none'; script-src 'unsafe-inline'"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
    page = tmp_path / "page.html"
    page.write_text(f'{policy}<script>nowhere()</script><img src="http://127.0.0.1:9/x.png">')
    console = browse(page, tmp_path / "browser")[1]
    assert any("nowhere is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
