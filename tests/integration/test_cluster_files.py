"""The files in cluster/ against the schemas of Ray and KubeRay, Ray's packaging, and linters.

test_cluster_scripts.py runs the scripts on real raylets.
"""

import gzip
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # Ray depends on both
import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY_SCHEMA = ROOT.parent / "shared" / "kuberay-schema"
LAUNCHERS = ("aws.yaml", "gcp.yaml")
SCRIPTS = ("local.sh", "install.sh", "slurm.sbatch")
CUSTOM_RESOURCES = {"kuberay/raycluster.yaml": "rayclusters", "kuberay/rayjob.yaml": "rayjobs"}
PACKAGE_LIMIT = 5 * 2**20

Json = dict[str, Any]


def load(name: str) -> Json:
    document: Json = yaml.safe_load((CLUSTER / name).read_text())
    return document


def pinned(package: str) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(line.split("==") for line in project["tool"]["uv"]["constraint-dependencies"])
    version: str = pins[package]
    return version


# --- the cluster launcher ---------------------------------------------------------------------


def validate_launcher(config: Json) -> Json:
    """What `ray up` does before it talks to a cloud: defaults, then Ray's schema and checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: Json = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_satisfy_rays_schema(name: str) -> None:
    prepared = validate_launcher(load(name))
    assert set(prepared["available_node_types"]) == {"head", "gpu", "cpu"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_schema_refuses_an_unknown_key(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_launcher(load(name) | {"idle_timeout_minuts": 5})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_starts_ray_with_a_token_and_the_dashboard_on_loopback(name: str) -> None:
    config = load(name)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_mounts_exist(name: str) -> None:
    local = [p for p in load(name)["file_mounts"].values() if not p.startswith("~")]
    assert local
    assert [p for p in local if not (ROOT / p).exists()] == []


# --- Kubernetes -------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with every object closed: the API server drops unknown fields, so typos pass."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def kuberay_schema(plural: str) -> Json:
    path = KUBERAY_SCHEMA / f"{plural}.v1.json.gz"
    if not path.exists():
        pytest.skip(f"KubeRay's schema is not at {path}")
    with gzip.open(path, "rt") as file:
        schema: Json = closed(json.load(file)["openAPIV3Schema"])
    return schema


@pytest.mark.parametrize("name", CUSTOM_RESOURCES)
def test_custom_resources_satisfy_kuberays_schema(name: str) -> None:
    jsonschema.validate(load(name), kuberay_schema(CUSTOM_RESOURCES[name]))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "enableInTreeAutoscalin"),
        (("spec", "headGroupSpec", "template", "spec", "securityContext"), "runAsNonRot"),
        (("spec", "workerGroupSpecs", 0), "maxReplica"),
    ],
)
def test_kuberays_schema_refuses_a_typo(path: tuple[str | int, ...], key: str) -> None:
    document = load("kuberay/raycluster.yaml")
    target: Any = document
    for step in path:
        target = target[step]
    target[key] = 1
    with pytest.raises(jsonschema.ValidationError, match=key):
        jsonschema.validate(document, kuberay_schema("rayclusters"))


def test_the_job_brings_the_same_cluster_as_the_standing_one() -> None:
    assert (
        load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
        == load("kuberay/raycluster.yaml")["spec"]
    )


def pod_specs(resource: Json) -> Iterator[Json]:
    """Every pod template in a custom resource."""
    if isinstance(resource, dict):
        if "containers" in resource:
            yield resource
        for value in resource.values():
            yield from pod_specs(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from pod_specs(value)


@pytest.mark.parametrize(
    ("name", "pods"), [("kuberay/raycluster.yaml", 3), ("kuberay/rayjob.yaml", 4)]
)
def test_pods_satisfy_the_restricted_standard(name: str, pods: int) -> None:
    specs = list(pod_specs(load(name)))
    assert len(specs) == pods
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_kubernetes_cluster_is_closed() -> None:
    spec = load("kuberay/raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ncfm-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"] == pinned("ray")


def test_the_readme_installs_the_tested_ray() -> None:
    readme = (CLUSTER / "README.md").read_text()
    assert set(re.findall(r"ray\[default\]==([\d.]+)", readme)) == {pinned("ray")}


def test_the_base_objects_fit_the_cluster() -> None:
    documents = {
        d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "kuberay/base.yaml").read_text())
    }
    assert set(documents) == {
        "Namespace",
        "PersistentVolumeClaim",
        "NetworkPolicy",
    }  # above all no Secret
    claim, policy = documents["PersistentVolumeClaim"], documents["NetworkPolicy"]["spec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = load("kuberay/raycluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]
        assert template["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
        volumes = [v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"]]
        assert volumes == [claim["metadata"]["name"]]
    submitter = load("kuberay/rayjob.yaml")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    allowed = [
        peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]
    ]
    assert submitter in allowed
    assert {} not in allowed


KUBERNETES_NODES = {"gpu": 32.0, "cpu": 64.0}  # g2-standard-8, e2-standard-16 of the README: GiB


def gke_allocatable(memory: float) -> float:
    """GiB left for pods, by GKE's published reservations for the kubelet and eviction."""
    steps = [(4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06)]
    reserved, rest = 100 / 1024, memory
    for size, share in steps:
        reserved += share * min(size, rest)
        rest = max(0.0, rest - size)
    return memory - reserved - 0.02 * rest


def test_pods_fit_the_machines_of_the_readme() -> None:
    """With 2 GiB for the pods that GKE itself puts on every node."""
    readme = (CLUSTER / "README.md").read_text()
    assert "--machine-type=g2-standard-8" in readme
    assert "--machine-type=e2-standard-16" in readme
    assert gke_allocatable(32) == pytest.approx(28.34, abs=0.01)
    for name in CUSTOM_RESOURCES:
        spec = load(name)["spec"]
        for group in spec.get("rayClusterSpec", spec)["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            memory = float(container["resources"]["requests"]["memory"].removesuffix("Gi"))
            assert memory + 2 <= gke_allocatable(KUBERNETES_NODES[group["groupName"]]), name


def test_google_clouds_machines_exist_and_take_their_disks() -> None:
    sizes = {"e2": {2, 4, 8, 16, 32}, "n2": {2, 4, 8, 16, 32, 48, 64, 80, 96, 128}}
    sizes |= {"c3": {4, 8, 22, 44, 88, 176}, "g2": {4, 8, 12, 16, 24, 32, 48, 96}}
    for node in load("gcp.yaml")["available_node_types"].values():
        config = node["node_config"]
        family, kind, cpus = config["machineType"].split("-")
        assert kind == "standard"
        assert int(cpus) in sizes[family]
        assert node["resources"]["CPU"] in (0, int(cpus))
        for disk in config["disks"]:  # C3 and G2 refuse the default, pd-standard
            assert disk["initializeParams"]["diskType"].endswith("/pd-balanced")


def test_awss_head_needs_no_rights_to_look_up_the_image() -> None:
    for node in load("aws.yaml")["available_node_types"].values():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["node_config"]["ImageId"])


# --- the image, the installation, the job's environment ---------------------------------------


def test_the_image_does_not_run_as_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["1000:1000"]
    last_run = max(i for i, line in enumerate(lines) if line.startswith("RUN"))
    assert next(i for i, line in enumerate(lines) if line.startswith("USER")) > last_run


def test_the_image_finds_gkes_driver() -> None:
    (line,) = re.findall(r"LD_LIBRARY_PATH=(\S+)", (CLUSTER / "Dockerfile").read_text())
    assert line == "/usr/local/nvidia/lib64"


def test_the_docker_build_context_has_what_is_copied() -> None:
    kept = {
        line[1:]
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in (CLUSTER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for source in line.split()[1:-1]
    }
    assert copied == kept
    assert [path for path in kept if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("with_code", [True, False])
def test_install_pins_the_tested_versions(tmp_path: Path, with_code: bool) -> None:
    """install.sh with a stand-in for pip: what is installed, and under which constraints."""
    checkout = tmp_path / "checkout"
    (checkout / "cluster").mkdir(parents=True)
    for name in ("install.sh", "requirements.txt"):
        shutil.copy(CLUSTER / name, checkout / "cluster")
    if with_code:
        (checkout / "ncfm").mkdir()
    python = executable(
        tmp_path / "python",
        """
        echo "$@"
        while (($#)); do
          if [[ $1 == -c || $1 == -r ]]; then cat "$2"; fi
          shift
        done
        """,
    )
    output = run_checked(checkout / "cluster/install.sh", python, "boto3")
    assert re.match(r"-m pip install .*--only-binary :all: --require-hashes -r \S+\n", output)
    assert re.search(rf"^ray=={pinned('ray')} --hash", output, re.MULTILINE)
    assert re.search(r"^-m pip install .* -c \S+ boto3\n-m pip freeze ", output, re.MULTILINE)
    assert (
        bool(re.search(rf"^-m pip install .*--no-deps {checkout}$", output, re.MULTILINE))
        is with_code
    )


def requirements() -> dict[str, set[str]]:
    """The versions in requirements.txt: some packages have another one for newer Pythons."""
    found: dict[str, set[str]] = {}
    for line in (CLUSTER / "requirements.txt").read_text().splitlines():
        requirement, *hashes = line.split(" --hash=")
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), line
        name, version = requirement.partition(";")[0].strip().split("==")
        found.setdefault(name, set()).add(version)
    return found


def dependencies(package: str, extras: frozenset[str], seen: set[str]) -> set[str]:
    """All packages installed here that an installed one needs, itself included."""
    seen.add(package)
    for text in requires(package) or []:
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        wanted = [needed.marker is None or needed.marker.evaluate({"extra": e}) for e in extras]
        if any(wanted) and name not in seen and installed(name):
            dependencies(name, frozenset({"", *needed.extras}), seen)
    return seen


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def test_every_node_gets_the_same_versions_of_all_dependencies() -> None:
    found = requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = dependencies("ncfm-ray", frozenset({""}), set()) - {"ncfm-ray"}
    assert {"torch", "ray", "aiohttp", "filelock"} <= runtime, "not the direct ones alone"
    for extra in project["project"]["optional-dependencies"].values():
        runtime |= {Requirement(text).name for text in extra}
    assert runtime - found.keys() == set()
    for line in project["tool"]["uv"]["constraint-dependencies"]:
        name, pin = line.split("==")
        assert found.get(name, {pin}) == {pin}
    assert "://" not in (CLUSTER / "requirements.txt").read_text()  # names no package index


def test_the_image_has_the_cuda_that_torch_was_built_for() -> None:
    (base,) = re.findall(r"^FROM (.*)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    match = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", base)
    (toolkit,) = requirements()["cuda-toolkit"]
    assert match
    assert toolkit.startswith(f"{match[1]}.")


def package(directory: Path, target: Path, excludes: list[str]) -> set[str]:
    """Ray's own packaging of a working directory; the names inside."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(directory), target, include_gitignore=False, excludes=excludes)
    with zipfile.ZipFile(target) as archive:
        return set(archive.namelist())


def test_the_working_directory_stays_small(tmp_path: Path) -> None:
    """A checkout after some use, with 6 MiB of noise wherever large things end up."""
    from ray.runtime_env import RuntimeEnv

    excludes = load("runtime_env.yaml")["excludes"]
    RuntimeEnv(**load("runtime_env.yaml"))  # raises on an unknown field
    checkout = tmp_path / "checkout"
    for name in ("ncfm", "pipeline", "cluster", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for name in (
        ".git/objects/pack",
        "runs/builtin/synthetic.safetensors",
        "tests/data/images.bin",
        "data/train.tar",
        "model.pt",
        "pipeline/__pycache__/run.pyc",
        ".mypy_cache/3.11/cache.db",
        "ncfm-0.log",
    ):
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(6 * 2**20))

    names = package(checkout, tmp_path / "with.zip", excludes)
    assert (tmp_path / "with.zip").stat().st_size < PACKAGE_LIMIT
    assert {
        "pipeline/run.py",
        "pipeline/presets/builtin.toml",
        "ncfm/__init__.py",
        "pyproject.toml",
    } <= names
    assert not any(name.startswith((".git/", "runs/", "tests/", "data/")) for name in names)
    package(checkout, tmp_path / "without.zip", [])  # the noise is noise: the excludes did it
    assert (tmp_path / "without.zip").stat().st_size > PACKAGE_LIMIT


def test_no_secret_in_an_argument() -> None:
    """Everybody on a machine sees the arguments of its processes."""
    readme = (CLUSTER / "README.md").read_text()
    assert "--from-literal" not in readme
    assert "--from-file=auth_token=/dev/stdin" in readme


def test_no_secret_in_the_files() -> None:
    """No Kubernetes Secret, no literal token, no key: only references to them."""
    for path in CLUSTER.rglob("*"):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        text = path.read_text()
        assert not re.search(r"^kind: Secret", text, re.MULTILINE), path
        assert not re.search(r"RAY_AUTH_TOKEN=[^$\s\"']", text), path
        assert not re.search(
            r"(?<!sha256:)\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text
        ), path


# --- the shell scripts ------------------------------------------------------------------------


def executable(path: Path, script: str) -> Path:
    """Write a bash script and make it executable."""
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(script))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_checked(*command: Path | str) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


def lint(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a linter of the development dependencies, whose wheels bring the programs."""
    beside = Path(sys.executable).with_name(program)
    binary = shutil.which(program) or (str(beside) if beside.exists() else None)
    if binary is None:
        pytest.skip(f"{program} is not installed")
    return subprocess.run([binary, str(path)], capture_output=True, text=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name: str) -> None:
    result = lint("shellcheck", CLUSTER / name)
    assert result.returncode == 0, result.stdout


def test_hadolint(tmp_path: Path) -> None:
    result = lint("hadolint", CLUSTER / "Dockerfile")
    assert result.returncode == 0, result.stdout
    (tmp_path / "Dockerfile").write_text("FROM nvidia/cuda\nRUN cd /tmp && sudo apt install g++\n")
    assert {"DL3006", "DL3004"} <= set(
        re.findall(r"DL\d+", lint("hadolint", tmp_path / "Dockerfile").stdout)
    )


@pytest.mark.parametrize("argument", ["", "0", "-1", "two"])
def test_local_refuses_a_wrong_number(argument: str) -> None:
    result = subprocess.run([CLUSTER / "local.sh", argument], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"got '{argument}'" in result.stderr


def test_slurm_refuses_a_foreign_directory(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch", "true"],
        env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "submit from the repository's root" in result.stderr
