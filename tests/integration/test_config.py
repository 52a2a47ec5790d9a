"""The command line: what it accepts, and how it says no."""

import subprocess
import sys
from pathlib import Path

import pytest
from upath import UPath

from pipeline.config import PRESETS, STAGES, UsageError, parse_command

ROOT = Path(__file__).parents[2]


def test_the_default_is_the_builtin_preset() -> None:
    command = parse_command([])
    assert command.stages == STAGES
    assert command.config.source.kind == "builtin"
    assert command.config.run_directory == Path("runs/builtin").absolute()
    assert command.config == parse_command(["--config", str(PRESETS / "builtin.toml")]).config


def test_presets_then_overrides(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("ipc = 7\n[distill]\nlr = 5e-4\n")
    config = parse_command(["distill", "--config", str(preset), "--distill.num_steps", "9"]).config
    assert (config.ipc, config.distill.lr, config.distill.num_steps) == (7, 5e-4, 9)
    assert config.run_directory.name == "mine"


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    command = parse_command(["--ipc", "3", "--augment.strategy", "none", "--name", "x"])
    (tmp_path / "config.toml").write_text(command.toml)
    assert parse_command(["--config", str(tmp_path / "config.toml")]).config == command.config


def test_a_preset_in_an_object_store() -> None:
    preset = UPath("memory://test-config/tune/best.toml")
    preset.write_text("ipc = 7\n")
    config = parse_command(["--config", str(preset), "--storage_path", "memory://runs"]).config
    assert (config.ipc, str(config.run_directory)) == (7, "memory://runs/best")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ipc", "0"], "ipc must be at least 1, got 0"),
        (["--ipc", "many"], "--ipc: .*int.*many"),
        (["--distill.lrr", "1"], "unrecognized arguments: --distill.lrr"),
        (["--synthetic.factor", "64"], "factor must not exceed.*64 > 32"),
        (["--source.kind", "folder"], "source.path"),
        (["--source.kind", "cloud"], "builtin.*folder.*cloud"),
        (["--source.name", "cifar"], "Expected one of 'CIFAR10', .*'SVHN' or nothing. Got .*cifar"),
        (["--config", "nowhere.toml"], "nowhere.toml.*builtin.toml"),
        (["--config", "memory://nowhere.toml"], "nowhere.toml.*builtin.toml"),
        (["--config", "s5://bucket/x.toml"], "cannot read --config s5://bucket/x.toml: .*'s5'"),
        (["--storage_path", "s5://bucket"], "storage_path s5://bucket: Unsupported .*'s5'"),
        (["--seed", "1", "--config", "x.toml"], "--config must come before"),
        (["sharrd"], "no stage 'sharrd'.*shard, pretrain"),
        (["--num_workers", "0"], "num_workers must be at least 1"),
        (["--name", "a/b"], "plain directory name.*'a/b'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_command(arguments)
    assert "\n" not in str(caught.value)


def test_a_typo_in_a_preset_is_an_error(tmp_path: Path) -> None:
    preset = tmp_path / "typo.toml"
    preset.write_text("[distill]\nnum_stepz = 3\n")
    with pytest.raises(UsageError, match="num_stepz"):
        parse_command(["--config", str(preset)])


def test_an_old_preset_is_told_what_replaced_its_options(tmp_path: Path) -> None:
    preset = tmp_path / "old.toml"
    preset.write_text("[stream]\nmemory_budget_mib = 512\n")
    for arguments in (["--config", str(preset)], ["--stream.memory_budget_mib", "512"]):
        with pytest.raises(
            UsageError, match=r"options stream\.\* are gone.*local_directory"
        ) as caught:
            parse_command(arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["--ipc", "0"], ["--source.kind", "folder", "--source.path", "/does/not/exist"]]
)
def test_the_script_ends_with_status_2_and_no_traceback(
    arguments: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipeline/run.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
