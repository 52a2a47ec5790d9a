"""Every command that the READMEs and the headers of the presets show parses, or runs.

Placeholders (DATA, X.toml, runs/a) are replaced by real folders and files. A program that cannot be
run here is exempt, with the reason beside it.
"""

import re
import shlex
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import PRESETS, STAGES, parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.observe.reporting.compare import compare_command

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "cluster" / "README.md")

EXEMPT = {
    **dict.fromkeys(("aws", "gcloud"), "needs an account at a cloud"),
    **dict.fromkeys(("kubectl", "helm"), "needs a Kubernetes cluster"),
    "docker": "needs a Docker daemon; test_cluster_files.py checks the Dockerfile",
    "curl": "needs the network",
    "pip": "needs a package index",
    "python3": "makes an environment in the home directory",
    "cluster/install.sh": "installs for minutes; test_cluster_files.py runs it",
    "cluster/local.sh": "starts raylets; test_cluster_scripts.py runs it",
    ".ci/run": "runs this very test",
    "pytest": "runs this very test",
    **dict.fromkeys(
        (
            "base64",
            "cd",
            "chmod",
            "echo",
            "export",
            "grep",
            "mkdir",
            "openssl",
            "sleep",
            "source",
            "tail",
            "tar",
            "tr",
        ),
        "of the shell or the system: nothing of ours",
    ),
    "uv venv": "makes an environment",
    "uv pip": "needs a package index",
}

KEYWORDS = ("until", "do", "done")  # of the shell

FOLDERS = {  # values of --source.path in the documents: all stand for a folder of images
    *("DATA", "uoft-cs/cifar10", "cifar-10-python.tar.gz"),
    *("/shared/data/imagenette2-320", "$SCRATCH/data/imagenette2-320"),
    *("CIFAR10", "CIFAR100", "FASHION_MNIST", "TINY_IMAGENET", "IMAGENET", "IMAGENET100"),
    *(f"IMAGE{s}" for s in ("NETTE", "WOOF", "FRUIT", "MEOW", "SQUAWK", "YELLOW")),
}
PRESET_FILES = {  # values of --config that are no file of a checkout
    "pipeline/presets/X.toml": PRESETS / "builtin.toml",
    "runs/builtin_tune/tune/best.toml": PRESETS / "builtin.toml",
}


def lines_of(document: str) -> list[str]:
    """The logical lines of a document's bash blocks: with continuations and open quotes joined."""
    lines: list[str] = []
    for block in re.findall(r"```bash\n(.*?)```", document, re.DOTALL):
        open_line = ""
        for line in block.replace("\\\n", " ").splitlines():
            open_line += line
            try:
                shlex.split(open_line, comments=True)
            except ValueError:  # a quote is still open
                open_line += "\n"
                continue
            lines.append(open_line)
            open_line = ""
        assert not open_line, f"a quote is never closed: {open_line}"
    return lines


def commands_of(line: str) -> list[list[str]]:
    """The simple commands of a shell line, without variables set before them and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = [re.sub(r"^[A-Za-z_]\w*=.*$", "", word) for word in lexer]
    groups = groupby(words, key=lambda word: not word or set(word) <= set("&|;()"))
    commands = [list(group) for separator, group in groups if not separator]
    ended = [re.split(r"\0[<>]+\0", "\0".join([*command, ""]))[0] for command in commands]
    found = [[w for w in command.split("\0") if w and w not in KEYWORDS] for command in ended]
    # What follows a $(...) goes on with the command around it.
    return [words for words in found if words and words[0][0] not in "-/"]


def documented() -> list[tuple[str, list[str]]]:
    """(document, command) of all documents."""
    found = []
    for readme in READMES:
        lines = lines_of(readme.read_text())
        found += [(str(readme.relative_to(ROOT)), c) for line in lines for c in commands_of(line)]
    for preset in sorted(PRESETS.glob("*.toml")):
        header = re.findall(r"^#   (.*)$", preset.read_text(), re.MULTILINE)
        found += [(preset.name, command) for line in header for command in commands_of(line)]
    return found


def program_of(command: Sequence[str]) -> str:
    """What a command starts, behind `uv run`, `ray job submit` and the like."""
    if "pipeline/run.py" in command:
        return "pipeline/run.py"
    if command[:2] == ["uv", "run"]:
        return next(w for w in command[2:] if not w.startswith("-") and w != "dev")
    return " ".join(command[:2]) if command[0] == "uv" else command[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images as the READMEs ask for it."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    return tmp_path / "images"


def check_pipeline(arguments: Sequence[str], images: Path, tmp_path: Path) -> None:
    """Parse the arguments of pipeline/run.py and open their source; `compare` runs.

    Raises UsageError as the program would.
    """
    options = list(arguments)
    if options[:1] == ["compare"]:
        for run in options[1:]:
            (tmp_path / run).mkdir(parents=True)
            (tmp_path / run / "config.toml").write_text("ipc = 1\n")
        runs = [str(tmp_path / run) for run in options[1:]]
        assert compare_command([*runs, "--output", str(tmp_path / "compare.html")]).exists()
        return
    kind = options[options.index("--source.kind") + 1] if "--source.kind" in options else "folder"
    for i, (option, value) in enumerate(pairwise(options), start=1):
        if option == "--source.path":
            assert value in FOLDERS, f"{value}: what folder does it stand for?"
            options[i] = str(images)
        if option == "--config":
            options[i] = str(PRESET_FILES.get(value, ROOT / value))
    named = bool(options) and not options[0].startswith("-")
    command = parse_command([*options, "--storage_path", str(tmp_path / "runs")])
    assert command.stages == ((options[0],) if named else STAGES)
    if kind == "folder":  # others need files of their own, or the network
        run = Run(command)
        assert [run.action(name).name for name in command.stages] == list(command.stages)
        if command.config.plan.nodes is not None:  # computed for data that are not at hand
            run.perform(command.stages)
        elif command.config.source.kind == "folder":
            assert run.source.class_names == ("cat", "dog")


def check_ray(words: Sequence[str]) -> None:
    """Parse a command line of `ray` by Ray's own parser, and find the files that it names."""
    from ray.scripts.scripts import cli

    with cli.make_context("ray", list(words)) as context:
        command, rest = cli, list(words)
        while hasattr(command, "resolve_command"):
            _, command, rest = command.resolve_command(context, rest)
        command.make_context(command.name, rest, parent=context).close()
    for word in words:
        if word.startswith("cluster/"):
            assert (ROOT / word).is_file(), word


COMMANDS = documented()


@pytest.mark.parametrize(
    ("document", "command"),
    COMMANDS,
    ids=[f"{document}: {shlex.join(command)[:90]}" for document, command in COMMANDS],
)
def test_the_command_parses(
    document: str,
    command: list[str],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    program = program_of(command)
    if program == "pipeline/run.py":
        check_pipeline(command[command.index(program) + 1 :], images, tmp_path)
    elif command[0] != "ray":
        assert program in EXEMPT, f"{document}: what is {shlex.join(command)}?"
        if (ROOT / program).is_file():
            assert (ROOT / program).stat().st_mode & 0o111, f"{program} is not executable"
    if command[0] == "ray":
        check_ray(command[1:])


def test_all_commands_were_looked_at() -> None:
    """No exemption and no placeholder is left over, and nothing was lost on the way."""
    assert {program_of(c) for _, c in COMMANDS} >= EXEMPT.keys()
    paths = {b for _, c in COMMANDS for a, b in pairwise(c) if a == "--source.path"}
    assert paths >= FOLDERS
    ours = [document for document, c in COMMANDS if program_of(c) == "pipeline/run.py"]
    assert {p.name for p in PRESETS.glob("*.toml")} - {"builtin.toml"} < set(ours)
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert ours.count("README.md") == sum(b.count("pipeline/run.py") for b in blocks)


def test_a_wrong_command_is_found(images: Path, tmp_path: Path) -> None:
    """Negative controls."""
    preset = ["--config", "pipeline/presets/cifar10_ipc10.toml"]
    with pytest.raises(UsageError, match=r"needs source\.path"):
        check_pipeline(["plan", *preset], images, tmp_path)
    with pytest.raises(UsageError, match="--no_such"):
        check_pipeline(["--no_such", "option"], images, tmp_path)
    with pytest.raises(AssertionError, match="SOMEWHERE"):
        check_pipeline([*preset, "--source.path", "SOMEWHERE"], images, tmp_path)
    with pytest.raises(Exception, match="No such command"):
        check_ray(["no-such-command"])
    with pytest.raises(Exception, match="No such option"):
        check_ray(["up", "cluster/aws.yaml", "--no-such-option"])
    line = "A=$(aws ec2 describe | jq x) && ray up a.yaml >/dev/null # B"
    assert [c[0] for c in commands_of(line)] == ["aws", "jq", "ray"]
    assert commands_of(line)[-1] == ["ray", "up", "a.yaml"]
