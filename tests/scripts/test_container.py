"""scripts/Dockerfile: its structure, and what its steps do.

FASTTRAIN_BASE may name an image, such as ubuntu:24.04, that buildah can use as the base. Then the image is built and
run, which takes 12 GB and some minutes.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

DOCKERFILE = ROOT / "scripts" / "Dockerfile"
# What a build must not send to Docker: large, private, or of no use in the image.
KEPT_OUT = (
    ".git/HEAD",
    ".venv/bin/python",
    "build/lib/fasttrain/train.py",
    "data/cat/1.jpg",
    "fasttrain/__pycache__/train.pyc",
    "fasttrain.egg-info/PKG-INFO",
    "images.safetensors",
    "pipelines/__pycache__/plan.pyc",
    "runs/demo/log.jsonl",
    "scripts/results/batch.png",
    "tests/test_train.py",
)


def instructions() -> list[tuple[str, str]]:
    """The instructions and their arguments, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions by stage. What precedes the first FROM is left out."""
    found: list[list[tuple[str, str]]] = []
    for instruction, argument in instructions():
        if instruction == "FROM":
            found.append([])
        if found:
            found[-1].append((instruction, argument))
    return found


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [argument for name, argument in stage if name == instruction]


def variables(stage: list[tuple[str, str]]) -> dict[str, str]:
    """The environment that a stage's ENV instructions set."""
    return dict(word.split("=", 1) for argument in values(stage, "ENV") for word in shlex.split(argument))


def copied() -> set[str]:
    """The paths of the project that are copied into the image or used in the build."""
    sources: set[str] = set()
    for stage in stages():
        for argument in values(stage, "COPY"):
            if not argument.startswith("--from="):
                sources |= set(argument.split()[:-1])
    return sources


def ignored(path: str) -> bool:
    """Whether Dockerfile.dockerignore keeps a path out. As in Docker, the last pattern that matches the path or one of
    its parents decides."""
    parts = path.split("/")
    parents = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    result = False
    for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, parent) for parent in parents):
            result = not line.startswith("!")
    return result


def test_the_base_has_a_version():
    base = next(argument for name, argument in instructions() if (name, argument[:5]) == ("ARG", "BASE="))
    assert re.fullmatch(r"BASE=nvidia/cuda:13\.\d+\.\d+-base-ubuntu24\.04", base)
    froms = [stage[0][1].split()[0] for stage in stages()]
    assert froms == ["${BASE}", "python", "python"]


def test_the_image_runs_fasttrain_as_a_user_who_is_not_root():
    last = stages()[-1]
    users = values(last, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    useradd = next(argument for argument in values(last, "RUN") if "useradd" in argument)
    assert f"--uid {users[-1].split(':')[0]}" in useradd
    # Lists, not lines for a shell, which would not pass signals on.
    assert values(last, "ENTRYPOINT") == ['["fasttrain"]'] and values(last, "CMD") == ['["--help"]']
    assert [name for name, _ in last].index("USER") > max(i for i, (name, _) in enumerate(last) if name == "RUN")


def test_any_user_can_write_where_programs_write():
    last = stages()[-1]
    made = next(argument for argument in values(last, "RUN") if "install -d -m 1777" in argument)
    folders = set(made.split("install -d -m 1777 ")[1].split())
    env = variables(last)
    names = ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    assert {env[name] for name in names} | {values(last, "WORKDIR")[-1]} <= folders


def test_the_driver_is_asked_for_what_torch_and_dali_need():
    env = variables(stages()[-1])
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(env["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility", "video"}


def test_a_change_of_the_source_does_not_install_torch_again():
    """The step that installs it comes before all that depends on the source, except the list of requirements."""
    last = stages()[-1]
    install = next(number for number, (_, argument) in enumerate(last) if "-r /opt/requirements.txt" in argument)
    before = [argument for name, argument in last[:install] if name == "COPY"]
    assert before == ["--from=wheel /wheel/requirements.txt /opt/requirements.txt"]
    assert "--mount=type=cache,target=/root/.cache/pip" in last[install][1]


def test_what_is_copied_exists_and_is_sent_to_docker():
    assert {"setup.py", "fasttrain", "pipelines", "kernels"} <= copied()
    for path in copied():
        assert (ROOT / path).exists() and not ignored(path), path
        if (ROOT / path).is_dir():
            assert not [file for file in (ROOT / path).rglob("*.py") if ignored(str(file.relative_to(ROOT)))]
    assert not ignored("fasttrain/data/vipriors/train.txt.gz")


@pytest.mark.parametrize("path", KEPT_OUT)
def test_everything_else_is_kept_out(path):
    assert ignored(path)


def test_setup_py_has_the_extras():
    extras = next(argument for argument in values(stages()[1], "ARG") if argument.startswith("EXTRAS="))
    text = (ROOT / "setup.py").read_text()
    for extra in shlex.split(extras)[0].removeprefix("EXTRAS=").split("|"):
        assert re.search(rf'^ +"{extra}": \[', text, re.M), extra


def test_kubernetes_and_slurm_use_what_the_image_has():
    yaml = pytest.importorskip("yaml")
    documents = yaml.safe_load_all((ROOT / "scripts" / "kubernetes.yaml").read_text())
    pod = next(each for each in documents if each["kind"] == "Job")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    last = stages()[-1]
    scripts = next(argument.split() for argument in values(last, "COPY") if argument.startswith("scripts/"))
    in_image = {scripts[-1] + os.path.basename(path) for path in scripts[:-1]}
    assert f"{container['workingDir']}/{container['command'][1]}" in in_image
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert user == values(last, "USER")[-1] and pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False

    slurm = (ROOT / "scripts" / "slurm.sh").read_text()
    used = set(re.findall(r"bash (scripts/\w+\.sh)", re.sub(r"^#.*$", "", slurm, flags=re.M)))
    folders = set(re.findall(r"--(?:pwd|container-workdir)=([\w/]+)", slurm))
    assert len(used) == 2 and folders == {"/fasttrain"}
    assert {f"/fasttrain/{path}" for path in used} <= in_image
    exported = dict(re.findall(r"([A-Z_]+)=(/cache[\w/]*)", slurm))
    assert exported and exported.items() <= variables(last).items()


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["13", "12"])
def test_the_requirements_are_those_of_the_package_and_of_the_extras(tmp_path, cuda):
    """Run the step that builds the wheel, in a copy of what Docker would copy, with its folders below tmp_path."""
    source = tmp_path / "source"
    source.mkdir()
    for path in values(stages()[1], "COPY"):
        for name in path.split()[:-1]:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    run = re.sub(r"--mount=\S+", "", values(stages()[1], "RUN")[0])
    for folder in ("/tmp/venv", "/tmp/wheel", "/wheel"):
        run = re.sub(rf"(?<![\w/}}]){folder}\b", f"{tmp_path}{folder}", run)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    env = {**os.environ, "FASTTRAIN_CUDA": cuda, "EXTRAS": "parquet|remote"}
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    done = subprocess.run(["sh", "-c", run], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    requirements = [Requirement(line) for line in (tmp_path / "wheel" / "requirements.txt").read_text().splitlines()]
    plain = {requirement.name for requirement in requirements if requirement.marker is None}
    assert {"torch", f"nvidia-dali-cuda{cuda}0", "pyarrow", "fsspec", "s3fs"} <= plain
    assert not {"optuna", "pytest"} & plain
    extras = {str(requirement.marker) for requirement in requirements if requirement.marker}
    assert 'extra == "test"' in extras and 'extra == "parquet"' not in extras  # pip leaves these out
    assert len(list((tmp_path / "wheel").glob("fasttrain-*.whl"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("FASTTRAIN_BASE"), reason="FASTTRAIN_BASE names no image")
@pytest.mark.skipif(not shutil.which("buildah"), reason="buildah is not installed")
def test_the_image_trains_as_any_user(tmp_path):
    def buildah(*words: str) -> str:
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run(["buildah", *words], cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    buildah(
        *("build", "--isolation=chroot", "--layers", "--tag=fasttrain-test", "--file=scripts/Dockerfile"),
        *("--ignorefile=scripts/Dockerfile.dockerignore", f"--build-arg=BASE={os.environ['FASTTRAIN_BASE']}", "."),
    )
    container = buildah("from", "fasttrain-test")
    try:
        command = "fasttrain run --arch test_resnet --image-size 32 --batch-size 50 --epochs 1 --device cpu --out run"
        script = f"set -e; {command}; id -u; ls /fasttrain/scripts; grep -c . run/log.jsonl; fasttrain doctor"
        output = buildah(
            *("run", "--isolation=chroot", "--user=123456:123456", "--workingdir=/workspace", container, "--"),
            *("bash", "-c", script),
        )
    finally:
        buildah("rm", container)
    assert "123456" in output.splitlines() and "torchrun_status.sh" in output and "ok    DALI" in output
