"""The command line: what it accepts, and how it says no."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from upath import UPath

from pipeline.cli import PRESETS, STAGES, parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.methods import MethodName, method

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
        (["--seed", "1", "--config", "x.toml"], "--config needs a preset file, got 'x.toml'"),
        (["--config"], "--config needs a preset file, got ''"),
        (["sharrd"], "no stage 'sharrd'.*shard, pretrain"),
        (["--num_workers", "0"], "num_workers must be at least 1"),
        (["--distill.extractor", "snapshot"], "'snapshot' needs .* pretrain.snapshot_every, got 0"),
        (["--distill.calibration_ahead", "[0,6]"], "extractor must be 'snapshot'.* got 'blend'"),
        (["--distill.objective", "mean"], "ncfd, mmd, mmd_raw.*'mean'"),
        (["--method", "dmm"], "--method.*dm.*dance.*tgdd.*dmm"),
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


def test_a_renamed_option_is_named(tmp_path: Path) -> None:
    preset = tmp_path / "old.toml"
    preset.write_text("[evaluate]\nlegacy_every = 100\n")
    for arguments in (["--config", str(preset)], ["--evaluate.legacy_every", "100"]):
        with pytest.raises(UsageError, match=r"now evaluate\.best_on_test_every"):
            parse_command(arguments)


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ncfm search", {"search-proxy"}),
        ("ncfm audit --ipc_al", {"--ipc_allocation"}),
        ("ncfm --method d", {"dm", "dance"}),
        ("ncfm audit --ipc_allocation proportional --source.download ", {"true", "false"}),
        ("ncfm --seed ", set()),  # a number: the shell then offers files
    ],
)
def test_a_shell_completes_stages_options_and_their_words(
    line: str, expected: set[str], tmp_path: Path
) -> None:
    """As bash calls the command at a Tab, by the functions of argcomplete."""
    pytest.importorskip("argcomplete")
    told = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    told |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    command = [sys.executable, str(ROOT / "pipeline/run.py")]
    done = subprocess.run(
        command, env=os.environ | told, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = (tmp_path / "words").read_text().split("\v")
    assert {word.strip() for word in words} - {""} == expected


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t"])
def test_a_presets_sizes_of_a_convnet_are_not_those_of_another_network(name: str) -> None:
    """The command of the README, on the built-in preset, which sets a width."""
    model = parse_command(["--model.name", name]).config.model
    assert (model.name, model.width, model.depth) == (name, 128, None)
    assert parse_command(["--model.name", "convnet"]).config.model.width == 64
    assert parse_command(["--model.name", "ncfm.models.convnet.ConvNet"]).config.model.width == 64
    with pytest.raises(UsageError, match=f"only convnet takes a width, got 32 for {name}"):
        parse_command(["--model.width", "32", f"--model.name={name}"])


METHODS = get_args(MethodName)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_the_command_line_is_whole(name: str, tmp_path: Path) -> None:
    """Whatever a preset says of the method's part; what a run may spend stays the preset's."""
    preset = tmp_path / "some.toml"
    preset.write_text(
        "ipc = 10\n[distill]\nlr = 7.0\nnum_steps = 123\nblend = [0.2, 0.3]\n"
        "[pretrain]\nnetworks = 3\nsnapshot_every = 1\n[frequencies]\nsigma = 9.0\n"
        '[synthetic]\nfactor = 3\n[augment]\nstrategy = "flip"\n'
    )
    config = parse_command(["--config", str(preset), "--method", name]).config
    expected = method(name, ipc=10, image_size=config.shard.image_size)
    assert config.distill == dataclasses.replace(expected.distill, num_steps=123)
    assert (config.frequencies, config.synthetic) == (expected.frequencies, expected.synthetic)
    assert config.augment == expected.augment
    assert config.pretrain.networks == 3
    assert config.method_changes() == []
    command = parse_command(["--config", str(preset), f"--method={name}", "--distill.lr", "0.5"])
    assert command.config == dataclasses.replace(
        config, distill=dataclasses.replace(config.distill, lr=0.5)
    )
    assert command.config.method_changes() == ["distill.lr"]
    (tmp_path / "config.toml").write_text(command.toml)  # it gives itself again
    again = parse_command(["--config", str(tmp_path / "config.toml"), "--name", "some"])
    assert again.config == dataclasses.replace(command.config, name="some")


def test_a_method_in_a_preset_gives_way_to_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "some.toml"
    preset.write_text('method = "tgdd"\nipc = 50\n[distill]\ncalibration_ahead = [1, 2]\n')
    config = parse_command(["--config", str(preset)]).config
    assert config.distill.calibration_ahead == (1, 2)
    assert (config.distill.extractor, config.pretrain.snapshot_every) == ("snapshot", 1)
    assert config.method_changes() == ["distill.calibration_ahead"]
    other = parse_command(["--config", str(preset), "--method", "ncfm_psi"]).config
    assert other.distill.calibration_ahead is None
    assert other.frequencies.sampler == "psi"
    assert parse_command([]).config.method_changes() == []


def test_published_values() -> None:
    """As design and papers state them: the rate grows with ipc, and TGDD's weight falls at 50."""
    lrs = {
        (ipc, size): method("dance", ipc=ipc, image_size=size).distill.lr
        for ipc in (1, 50)
        for size in (32, 128)
    }
    assert lrs == pytest.approx({(1, 32): 0.01, (50, 32): 0.5, (1, 128): 0.1, (50, 128): 5.0})
    weights = [method("tgdd", ipc=i, image_size=32).distill.calibration for i in (1, 10, 50)]
    assert weights == [2.5, 2.5, 0.5]
    assert method("ncfm", ipc=1, image_size=32).distill.loss_weight == 300
    assert method("dm", ipc=1, image_size=32).synthetic.factor == 1


def test_presets_in_any_order_and_the_later_one_wins(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("ipc = 3\nseed = 5\n[distill]\nlr = 0.5\n")
    other.write_text("ipc = 4\n[distill]\nnum_steps = 7\n")
    before = parse_command(["--config", str(one), f"--config={other}", "--distill.lr", "0.25"])
    after = parse_command(["--distill.lr", "0.25", "--config", str(one), "--config", str(other)])
    assert before == after
    found = after.config
    assert (found.ipc, found.seed, found.name) == (4, 5, "other")
    assert (found.distill.lr, found.distill.num_steps) == (0.25, 7)
    turned = parse_command(["--config", str(other), "--config", str(one)]).config
    assert (turned.ipc, turned.distill.lr, turned.name) == (3, 0.5, "one")
    method = parse_command(["--method", "dance", "--distill.lr", "0.125", "--config", str(one)])
    assert (method.config.distill.objective, method.config.distill.lr) == ("mmd_raw", 0.125)


def test_the_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    Run(parse_command(["presets"])).perform(("presets",))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == sorted(
        p.stem for p in PRESETS.glob("*.toml")
    )
    place = lines.index("cifar10_ipc10")
    assert lines[place + 1].strip().startswith("CIFAR-10 (10 classes), 32 px")
    assert lines[place + 2].strip().startswith("Measured: ")


def test_the_doctor_says_what_there_is_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = parse_command(["doctor", "--storage_path", str(tmp_path / "a" / "b")])
    monkeypatch.setattr("pipeline.stages.doctor.library", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    Run(command).perform(("doctor",))
    out = capsys.readouterr().out
    assert re.search(r"^C\+\+ compiler +none that works", out, re.MULTILINE)
    assert "joins the cluster at 10.0.0.1:6379" in out
    assert re.search(rf"GiB free at {tmp_path}/a/b$", out, re.MULTILINE)
    assert not list(tmp_path.iterdir()), "nothing is written"
