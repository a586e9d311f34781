"""The requirements that `fasttrain doctor` checks, compared with the packaging library and with setup.py."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fasttrain.doctor import machine, packages


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """A function that adds the metadata of a distribution to those that Python finds first."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def add(name: str, version: str, requires: tuple[str, ...] = (), origin: dict | None = None) -> None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))

    return add


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """As if fasttrain were installed from a wheel, far from its source."""
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "site" / "fasttrain" / "doctor" / "packages.py"))


REQUIRES = (
    "numpy>=2.0",
    "nvidia-dali-cuda130<2.5,>=2.2",
    "torch>=2.11",
    'made-up-plot; extra == "plot"',
    'made-up-search>=4; extra == "tune"',
    'made-up-plot; extra == "tune"',
    'made-up-files[http,s3]; extra == "remote"',
    'made-up-tests; extra == "test"',
)


def test_every_requirement_of_setup_py_is_read(tmp_path, distribution):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "FASTTRAIN_CUDA": "13"})
    lines = Distribution.at(tmp_path / "fasttrain.egg-info").requires
    distribution("fasttrain", "0.1.0", lines)
    required = packages.requirements()
    assert required is not None and len(required) == len(lines) > 20
    for line, ours in zip(lines, required, strict=True):
        theirs = Requirement(line)
        assert (ours.name, SpecifierSet(ours.specifier)) == (theirs.name, theirs.specifier)
        assert Requirement(ours.text).extras == theirs.extras and Requirement(ours.text).marker is None
        assert theirs.marker is None or theirs.marker.evaluate({"extra": ours.extra})
        assert bool(ours.extra) == (theirs.marker is not None)


@pytest.mark.parametrize("specifier", ["", ">=2.2", "<2.5,>=2.2", ">=2", "<2.11,>=2.10.0", ">=0.26"])
@pytest.mark.parametrize("version", ["2.1.9", "2.2", "2.2.0", "2.4.1", "2.5", "2.5.0", "2.10.0+cu128", "2.11.0", "10"])
def test_versions_are_compared_as_pip_does(specifier, version):
    assert packages.accepts(specifier, version) == SpecifierSet(specifier).contains(version)


def finding(name: str) -> machine.Finding:
    return {finding.name: finding for finding in machine._by_metadata({"torch", *machine.DALI}, 13)}[name]


def test_missing_optional_packages_are_named_and_are_no_error(distribution, wheel):
    """The command names the packages. On PyPI, the name fasttrain may be another project's."""
    distribution("fasttrain", "0.1.0", REQUIRES)
    distribution("made-up-plot", "3.1")
    distribution("made-up-search", "3.6.0")
    optional = finding("optional packages")
    assert optional.good and optional.status == (
        "plot (made-up-plot 3.1); not installed: tune (made-up-search 3.6.0 is installed, not >=4), remote"
    )
    commands = dict(line.removeprefix("for ").split(": ", 1) for line in optional.fix.splitlines())
    assert {extra: shlex.split(command) for extra, command in commands.items()} == {
        "tune": ["pip", "install", "made-up-search>=4"],
        "remote": ["pip", "install", "made-up-files[http,s3]"],
    }


def test_a_checkout_installs_its_extras(distribution, monkeypatch, tmp_path):
    distribution("fasttrain", "0.1.0", REQUIRES)
    monkeypatch.chdir(ROOT)
    assert "for tune: pip install '.[tune]'" in finding("optional packages").fix.splitlines()
    monkeypatch.chdir(tmp_path)
    assert shlex.split(finding("optional packages").fix.splitlines()[-1])[-1] == f"{ROOT}[remote]"


def test_all_optional_packages_are_there(distribution, wheel):
    distribution("fasttrain", "0.1.0", REQUIRES)
    for name, version in (("made-up-plot", "1"), ("made-up-search", "4.0"), ("made-up-files", "2026.1")):
        distribution(name, version)
    optional = finding("optional packages")
    assert optional.good and not optional.fix and "not installed" not in optional.status


@pytest.mark.parametrize(("version", "good"), [("1.26.4", False), ("2.0.0", True)])
def test_a_needed_package_that_is_too_old(distribution, wheel, version, good):
    distribution("fasttrain", "0.1.0", REQUIRES)
    distribution("numpy", version)
    others = finding("other packages")
    assert others.good == good and version in others.status
    assert others.fix == ("" if good else "pip install 'numpy>=2.0'")


def test_where_fasttrain_comes_from(distribution, monkeypatch, wheel, tmp_path):
    """`pip install .`, `pip install FILE.whl` and a checkout that is gone."""
    monkeypatch.chdir(tmp_path)
    distribution("fasttrain", "0.1.0", REQUIRES, {"url": ROOT.as_uri(), "dir_info": {}})
    assert packages.checkout() == str(ROOT)
    distribution("fasttrain", "0.1.0", REQUIRES, {"url": Path("/x/fasttrain.whl").as_uri(), "archive_info": {}})
    assert packages.checkout() is None
    distribution("fasttrain", "0.1.0", REQUIRES, {"url": (tmp_path / "gone").as_uri(), "dir_info": {}})
    assert packages.checkout() is None


def test_a_wheel_is_for_one_cuda_version(distribution, wheel, monkeypatch):
    distribution("fasttrain", "0.1.0", REQUIRES)
    monkeypatch.setattr(machine, "installed", lambda name: None)
    assert machine.install_command(13, names=("torch",)) == "pip install 'torch>=2.11'"
    assert "its wheel is for another CUDA version" in machine.install_command(12, names=("torch",))


def test_fasttrain_may_run_without_being_installed(monkeypatch):
    monkeypatch.chdir(ROOT)

    def missing(name: str) -> list[str]:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", missing)
    lack = finding("fasttrain")
    assert not lack.good and not lack.needed and lack.fix.endswith("pip install .")
