"""The requirements in setup.py, the packages that pip resolves them to, the wheel, and scripts/environment.sh."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import click
import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.slow

CUDA12, CUDA13 = "nvidia-dali-cuda120", "nvidia-dali-cuda130"


def egg_info(folder: Path, cuda: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "FASTTRAIN_CUDA"}
    env |= {} if cuda is None else {"FASTTRAIN_CUDA": cuda}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def requirements(folder: Path, cuda: str | None) -> dict[str, Requirement]:
    """The package's requirements without its extras, by name."""
    done = egg_info(folder, cuda)
    assert done.returncode == 0, done.stderr
    required = map(Requirement, Distribution.at(folder / "fasttrain.egg-info").requires or [])
    return {requirement.name: requirement for requirement in required if not requirement.marker}


@pytest.mark.parametrize(
    ("cuda", "dali", "other"),
    [(None, CUDA13, CUDA12), ("", CUDA13, CUDA12), ("13", CUDA13, CUDA12), ("12", CUDA12, CUDA13)],
)
def test_exactly_one_dali_is_required(tmp_path, cuda, dali, other):
    required = requirements(tmp_path, cuda)
    assert dali in required and other not in required
    accepted = list(required[dali].specifier.filter(["2.1.1", "2.2.0", "2.3.0", "2.4.0", "2.4.1", "2.5.0", "3.0.0"]))
    assert accepted == ["2.2.0", "2.3.0", "2.4.0", "2.4.1"]


@pytest.mark.parametrize(("cuda", "accepted"), [("13", ["2.11.0", "2.15.0"]), ("12", ["2.10.0", "2.10.0+cu128"])])
def test_the_required_torch_is_built_for_the_chosen_cuda(tmp_path, cuda, accepted):
    versions = ["2.9.1", "2.10.0", "2.10.0+cu128", "2.11.0", "2.15.0"]
    assert list(requirements(tmp_path, cuda)["torch"].specifier.filter(versions)) == accepted


@pytest.mark.parametrize("cuda", ["11", "12.8", "cu12", " 12"])
def test_an_unsupported_cuda_is_refused_in_one_line(tmp_path, cuda):
    done = egg_info(tmp_path, cuda)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [f"FASTTRAIN_CUDA must be 12 or 13, not {cuda!r}"]


# pip without this machine's settings, except those that it needs to reach the package index.
def pip(*arguments: str) -> subprocess.CompletedProcess:
    kept = ("PIP_CERT", "PIP_PROXY", "PIP_INDEX_URL")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in kept}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run([sys.executable, "-m", "pip", *arguments], env=env, capture_output=True, text=True)


def resolve(required: list[str], machine: str, target: Path) -> dict[str, dict]:
    """pip's report on each package that it would install on a Linux machine with Python 3.12, by name.

    The machine has glibc 2.28, like RHEL 8. pip chooses wheels for that machine, but evaluates markers for the machine
    that it runs on.
    """
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)] + [f"manylinux2014_{machine}"]
    options = ["--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--report=-", "--retries=2"]
    options += ["--python-version=3.12", f"--target={target}", *(f"--platform={tag}" for tag in tags)]
    done = pip("install", *options, *required)
    assert done.returncode == 0, done.stderr
    packages = json.loads(done.stdout)["install"]
    return {package["metadata"]["name"].lower().replace("_", "-"): package for package in packages}


@pytest.fixture(scope="module")
def package_index():
    done = pip("index", "versions", CUDA13, "--retries=0", "--timeout=20")
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["13", "12"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_pip_finds_builds(package_index, tmp_path, machine, cuda):
    required = [str(requirement) for requirement in requirements(tmp_path, cuda).values()]
    packages = resolve(required, machine, tmp_path / "target")
    for package in packages.values():
        wheel = package["download_info"]["url"].rsplit("/", 1)[-1]
        assert wheel.endswith((f"{machine}.whl", "-any.whl")), wheel
    assert Version("2.2") <= Version(packages[f"nvidia-dali-cuda{cuda}0"]["metadata"]["version"]) < Version("2.5")
    other = {"13": "12", "12": "13"}[cuda]
    assert not [name for name in packages if name.endswith((f"-cu{other}", f"-cuda{other}0"))]

    linux = {"platform_system": "Linux", "platform_machine": machine, "python_version": "3.12", "extra": ""}
    of_torch = map(Requirement, packages["torch"]["metadata"]["requires_dist"])
    libraries = {library.name for library in of_torch if not library.marker or library.marker.evaluate(linux)}
    # PyPI's torch 2.10 for aarch64 has no CUDA. `fasttrain doctor` names the index that has a build with it.
    assert (f"nvidia-cudnn-cu{cuda}" in libraries) == ((machine, cuda) != ("aarch64", "12"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that pip builds from a copy of the source, together with its tests and scripts."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fasttrain", "pipelines", "kernels", "tests", "scripts"):
        skipped = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", str(source))
    assert done.returncode == 0, done.stderr
    return next(out.glob("fasttrain-*.whl"))


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    expected = {path.relative_to(ROOT) for path in (ROOT / "fasttrain").rglob("*.py")}
    expected |= {Path("fasttrain", folder, path.name) for folder in ("pipelines", "kernels") for path in
                 (ROOT / folder).glob("*.py")}  # fmt: skip
    expected |= {path.relative_to(ROOT) for path in (ROOT / "fasttrain" / "data" / "vipriors").glob("*.txt*")}
    expected |= {Path("fasttrain", "report", name) for name in ("page.css", "page.js")}
    names = [Path(name) for name in ZipFile(wheel).namelist()]
    assert {name for name in names if not name.parts[0].endswith(".dist-info")} == expected
    assert len(expected) > 140 and Path("fasttrain/data/vipriors/train.txt.gz") in expected


def test_the_wheels_metadata(wheel, tmp_path):
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    distribution = Distribution.at(next(tmp_path.glob("*.dist-info")))
    metadata = distribution.metadata
    assert metadata["Name"] == "fasttrain" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert [(point.name, point.value) for point in distribution.entry_points] == [
        ("fasttrain", "fasttrain.cli.main:main")
    ]
    # All requirements of an extra can be read without the packaging library, as `fasttrain doctor` does.
    for requirement in map(Requirement, distribution.requires or []):
        assert requirement.marker is None or str(requirement.marker).startswith('extra == "')


def test_a_wheel_without_its_dependencies_says_what_is_missing(wheel, tmp_path):
    """In an environment that has only click."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.copytree(Path(click.__file__).parent, site / "click")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = [environment / "bin" / "python", "-m", "fasttrain"]
    doctor = subprocess.run([*python, "doctor"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert doctor.returncode == 1 and not doctor.stderr
    lines = doctor.stdout.splitlines()
    lacking = [line.split(":")[0] for line in lines if line.startswith("LACK")]
    assert lacking == ["LACK  torch", "LACK  DALI", "LACK  other packages"]
    commands = " ".join(line for line in lines if "pip install" in line)
    for name in ("torch>=", "torchvision>=", "timm>=", "nvidia-dali-cuda130<", "numpy>=", "matplotlib", "s3fs"):
        assert name in commands
    # There is no source to install, and the name fasttrain on PyPI may be another project's.
    assert "pip install ." not in commands and "fasttrain[" not in commands and "install fasttrain" not in commands

    help_ = subprocess.run([*python, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert help_.returncode == 0 and "doctor" in help_.stdout
    run = subprocess.run([*python, "run", "--data", tmp_path], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1 and "fasttrain doctor" in run.stderr


@pytest.fixture
def environment(tmp_path):
    """A function that runs `environment ""` of scripts/environment.sh in a new folder, with a fake Python that only
    records its arguments. It returns the error output and these arguments."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"
    python = f'#!/bin/sh\n[ "$1" = -c ] || echo "$*" >>"{calls}"\n'
    for path in (tmp_path / "bin" / "python", tmp_path / "venv" / "bin" / "python"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(python)
        path.chmod(0o755)
    (tmp_path / "setup.py").touch()

    def run(system: str = "Linux x86_64", cuda: str | None = None) -> tuple[str, list[str]]:
        uname = tmp_path / "bin" / "uname"
        uname.write_text(f"#!/bin/sh\necho '{system}'\n")
        uname.chmod(0o755)
        calls.write_text("")
        env = {name: value for name, value in os.environ.items() if name != "FASTTRAIN_CUDA"}
        env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "VENV": "venv"}
        env |= {} if cuda is None else {"FASTTRAIN_CUDA": cuda}
        script = f'set -euo pipefail; . "{ROOT}/scripts/environment.sh"; environment ""'
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        lines = [line.replace(" --disable-pip-version-check", "") for line in calls.read_text().splitlines()]
        return done.stderr if done.returncode else "", lines

    return run


INSTALL = "-m pip install --editable ."


def test_an_environment_is_installed_once(environment):
    assert environment() == ("", [INSTALL])
    assert environment() == ("", [])
    assert environment(cuda="13") == ("", [])


def test_another_cuda_replaces_dali(environment):
    names = [f"{name}-cu{cuda}" for name in ("nvimgcodec", "nvjpeg2k", "nvtiff", "libnvcomp") for cuda in (12, 13)]
    removal = " ".join(["-m pip uninstall -qy", CUDA12, CUDA13, *(f"nvidia-{name}" for name in names)])
    environment()
    assert environment(cuda="12") == ("", [removal, INSTALL])
    assert environment(cuda="12") == ("", [])
    assert environment() == ("", [removal, INSTALL])


def test_cuda_12_on_aarch64_uses_pytorchs_package_index(environment):
    assert environment("Linux aarch64") == ("", [INSTALL])
    error, calls = environment("Linux aarch64", cuda="12")
    assert not error and "--extra-index-url https://download.pytorch.org/whl/cu12" in calls[-1]


@pytest.mark.parametrize(
    ("system", "cuda", "error"),
    [
        ("Linux riscv64", None, "needs Linux on x86-64 or aarch64; this is Linux riscv64"),
        ("Darwin arm64", None, "needs Linux on x86-64 or aarch64; this is Darwin arm64"),
        ("Linux x86_64", "11", "FASTTRAIN_CUDA must be 12 or 13, not 11"),
    ],
)
def test_an_unsupported_environment_is_refused_in_one_line(environment, system, cuda, error):
    output, calls = environment(system, cuda)
    assert output.splitlines() == [f"bash: {error}"] and not calls
