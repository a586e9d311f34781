"""scripts/slurm.sh, torchrun_status.sh and kubernetes.yaml without a cluster: with fake programs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from fasttrain.cli.main import main

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "scripts"
PROGRAMS = {
    # Like srun: sets the variables of a task and forwards signals to it (by replacing itself with the task).
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >>"$RECORDS/srun"; shift; done
        export SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost
        exec "$@"
    """,
    "scontrol": """
        [ "$1" != show ] || { echo localhost; exit; }
        echo "$*" >>"$RECORDS/scontrol"
    """,
    # Like Apptainer: leaves out its options and the image, and becomes the command.
    "apptainer": """
        printf '%s\\n' "$@" >"$RECORDS/apptainer"
        shift
        while [[ $1 == --* ]]; do shift; done
        shift
        exec "$@"
    """,
    # Like torchrun: exits with 1 after a signal, once its ranks have stopped.
    "torchrun": """
        printf '%s\\n' "$@" >"$RECORDS/arguments"
        env >"$RECORDS/environment"
        log=$RECORDS/run/log.jsonl
        stop() {
            echo "$1" >>"$RECORDS/signals"
            sleep 0.3  # time for another signal to arrive
            line='{"event": "stopped", "step": 7, "signal": "SIG'$1'"}'
            if [ -n "${LAG:-}" ]; then { sleep "$LAG"; echo "$line" >>"$log"; } & else echo "$line" >>"$log"; fi
            exit 1
        }
        trap 'stop USR1' USR1
        trap 'stop TERM' TERM
        mkdir -p "$RECORDS/run"
        [ "$DOES" != fail ] || exit 3
        echo '{"event": "start", "step": 0}' >>"$log"
        [ "$DOES" != crash ] || exit 1
        touch "$RECORDS/ready"
        while [ "$DOES" = train ]; do sleep 0.05; done
        echo '{"event": "end", "step": 9}' >>"$log"
    """,
}


class FakeCluster:
    """A folder with the fake programs, in which scripts run. The programs record their calls in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name, text in PROGRAMS.items():
            (self.programs / name).write_text("#!/usr/bin/env bash\n" + text)
            (self.programs / name).chmod(0o755)

    def start(self, *command: object, does: str, **env: str) -> subprocess.Popen:
        variables = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "RECORDS": str(self.folder),
                     "DOES": does, "GPUS": "2", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "localhost",
                     "PATIENCE": "0", **env}  # fmt: skip
        return subprocess.Popen(
            ["bash", *map(str, command)], cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True
        )

    def slurm(self, *options: object, does: str, **env: str) -> subprocess.Popen:
        options = options or ("--arch", "test_resnet", "--out", self.folder / "run")
        return self.start(SCRIPTS / "slurm.sh", *options, does=does, **env)

    def signal(self, process: subprocess.Popen, *numbers: signal.Signals) -> None:
        await_file(self.folder / "ready")
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)

    def records(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def await_file(path: Path, text: str = "", seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def wait(process: subprocess.Popen) -> tuple[int, str]:
    """The exit status and the error output of a process."""
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.fixture
def cluster(tmp_path) -> FakeCluster:
    return FakeCluster(tmp_path)


def test_slurms_signal_reaches_torchrun_once_and_the_job_is_queued_again(cluster):
    process = cluster.slurm(does="train")
    cluster.signal(process, signal.SIGUSR1, signal.SIGUSR1)
    status, stderr = wait(process)
    assert status == 75 and "the job is queued again" in stderr
    assert cluster.records("scontrol") == ["requeue 12345"]
    assert cluster.records("signals") == ["USR1"]
    assert "--kill-on-bad-exit=0" in cluster.records("srun")


def test_a_run_that_ends_is_not_queued_again(cluster):
    assert wait(cluster.slurm(does="end")) == (0, "") and not cluster.records("scontrol")


IMAGES = ["registry.example.com#fasttrain:latest", "/images/fasttrain.sif"]


@pytest.mark.parametrize("image", IMAGES)
def test_a_job_in_a_container(cluster, image):
    """pyxis adds options to srun; Apptainer is a command of its own. Signals and the status pass through both."""
    home = cluster.folder / "home"
    home.mkdir()
    env = {"IMAGE": image, "MOUNTS": "/data:/data,/out:/out", "HOME": str(home), "XDG_CACHE_HOME": ""}
    process = cluster.slurm(does="train", PYTHONPATH="/host", **env)
    cluster.signal(process, signal.SIGUSR1)
    assert wait(process)[0] == 75 and cluster.records("scontrol") == ["requeue 12345"]
    assert cluster.records("signals") == ["USR1"]

    mounts = f"{home}/.cache:/cache,/data:/data,/out:/out"
    srun, apptainer = cluster.records("srun"), cluster.records("apptainer")
    if image.endswith(".sif"):
        assert apptainer[0] == "exec" and {"--nv", "--pwd=/fasttrain", f"--bind={mounts}"} == set(apptainer[1:4])
        assert apptainer[4:7] == [image, "bash", "scripts/torchrun_status.sh"]
        assert not [option for option in srun if "container" in option]
    else:
        assert not apptainer and "--no-container-entrypoint" in srun
        expected = {f"--container-image={image}", f"--container-mounts={mounts}", "--container-workdir=/fasttrain"}
        assert expected <= set(srun)
    environment = dict(line.split("=", 1) for line in cluster.records("environment") if "=" in line)
    assert environment["XDG_CACHE_HOME"] == "/cache" and (home / ".cache").is_dir()
    assert environment["MASTER"] == "localhost" and "PYTHONPATH" not in environment


def test_a_job_without_a_container(cluster):
    assert wait(cluster.slurm(does="end"))[0] == 0
    assert cluster.records("srun") == ["--kill-on-bad-exit=0", "--wait=300"] and not cluster.records("apptainer")


@pytest.mark.parametrize(("does", "status"), [("fail", 3), ("crash", 1)])
def test_a_run_that_fails_is_not_queued_again(cluster, does, status):
    """Even if the log ends with the `stopped` event of an earlier run."""
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / "log.jsonl").write_text('{"event": "stopped", "step": 7, "signal": "SIGUSR1"}\n')
    assert wait(cluster.slurm(does=does))[0] == status and not cluster.records("scontrol")


def test_a_canceled_job_is_not_queued_again(cluster):
    """SLURM sends SIGTERM to the tasks, not SIGUSR1 to the script."""
    process = cluster.slurm(does="train")
    await_file(cluster.folder / "ready")
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(task), signal.SIGTERM)
    assert wait(process)[0] == 75 and not cluster.records("scontrol") and cluster.records("signals") == ["TERM"]


def test_the_script_waits_for_a_log_that_lags_behind(cluster):
    process = cluster.slurm(does="train", LAG="1.5", PATIENCE="20")
    cluster.signal(process, signal.SIGUSR1)
    assert wait(process)[0] == 75 and cluster.records("scontrol")


@pytest.mark.parametrize("form", [["--out", "OUT"], ["--out=OUT"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_status_of_a_run_that_was_stopped(cluster, form, number):
    options = [word.replace("OUT", str(cluster.folder / "run")) for word in form]
    process = cluster.start(SCRIPTS / "torchrun_status.sh", "torchrun", *options, does="train")
    if number == signal.SIGINT:  # the fake torchrun ignores it, like a shell's background jobs
        cluster.signal(process, number, signal.SIGTERM)
    else:
        cluster.signal(process, number)
    assert wait(process)[0] == 75 and cluster.records("signals") == ["TERM"]


def test_wrong_arguments_are_reported_in_one_line(cluster):
    for options in (["--arch", "x"], ["--out", "x", "--resume", "never"]):
        status, stderr = wait(cluster.start(SCRIPTS / "torchrun_status.sh", "torchrun", *options, does="end"))
        assert status == 2 and len(stderr.splitlines()) == 1
    assert not cluster.records("arguments")


def run_options(arguments: list[str]) -> dict:
    """The values of the options after `-m fasttrain run`. Raises click's error for an unknown option."""
    start = arguments.index("fasttrain")
    assert arguments[start - 1] == "-m" and arguments[start + 1] == "run"
    command = main.commands["run"]
    return command.make_context("run", arguments[start + 2 :]).params


def test_torchrun_accepts_the_options_and_the_signals(cluster, monkeypatch):
    assert wait(cluster.slurm(does="end"))[0] == 0
    from torch.distributed.run import get_args_parser

    environment = dict(line.split("=", 1) for line in cluster.records("environment") if "=" in line)
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", environment["PET_SIGNALS_TO_HANDLE"])
    torchrun = get_args_parser().parse_args(cluster.records("arguments"))
    assert "SIGUSR1" in torchrun.signals_to_handle.split(",") and torchrun.nnodes == "1"
    assert torchrun.master_port == 20000 + 12345 % 10000
    assert run_options(cluster.records("arguments"))["out"] == str(cluster.folder / "run")


def slurm_signal_seconds() -> int:
    match = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", (SCRIPTS / "slurm.sh").read_text(), re.M)
    assert match
    return int(match[1])


def test_ranks_have_time_to_save_before_slurms_limit():
    timeout = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", (SCRIPTS / "slurm.sh").read_text())
    assert timeout and int(timeout[1]) < slurm_signal_seconds()
    lines = (SCRIPTS / "slurm.sh").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command  # sbatch stops there


# ---- Kubernetes


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml")
    return {item["kind"]: item for item in yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())}


def test_the_parts_of_the_manifest_are_consistent(objects):
    assert objects.keys() == {"Service", "Job"}
    service, job = objects["Service"], objects["Job"]
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert rules[1]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert volumes == mounts.keys() and mounts["data"]["readOnly"] and mounts["shm"]["mountPath"] == "/dev/shm"
    env = {variable["name"]: variable for variable in container["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"]) < pod["terminationGracePeriodSeconds"]


def test_the_pods_command(objects, cluster):
    """Its options exist in torchrun and in `fasttrain run`; SIGTERM to process 1 reaches torchrun; the status is 75."""
    from torch.distributed.run import get_args_parser

    job = objects["Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    command = [word.replace("$(NODE_RANK)", "1") for word in container["command"]]
    assert "$(" not in " ".join(command) and (ROOT / command[1]).is_file()
    torchrun = get_args_parser().parse_args(command[3:])
    assert int(torchrun.nnodes) == job["spec"]["completions"] and torchrun.node_rank == 1
    assert int(torchrun.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert torchrun.master_addr == f"{job['metadata']['name']}-0.{objects['Service']['metadata']['name']}"
    options = run_options(command)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert options["data"][0] in mounts and os.path.dirname(options["out"]) in mounts

    process = cluster.start(*[word.replace("/out", str(cluster.folder)) for word in command[1:]], does="train")
    cluster.signal(process, signal.SIGTERM)
    assert wait(process)[0] == 75 and cluster.records("signals") == ["TERM"]


# ---- with the real torchrun


@pytest.mark.slow
def test_two_ranks_stop_save_and_resume(cluster, demo_set):
    """Run slurm.sh twice: up to the signal before the time limit, then to the end."""
    (cluster.programs / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    out = cluster.folder / "run"
    options = ["--arch", "test_resnet", "--image-size", 32, "--batch-size", 50, "--epochs", 20, "--device", "cpu"]
    options += ["--workers", 1, "--data", demo_set / "train", "--out", out, "--set", "machine.log_steps=2"]
    env = {"OMP_NUM_THREADS": "1", "PATIENCE": "30", "PORT": "29777"}
    process = cluster.slurm(*options, does="", **env)
    await_file(out / "log.jsonl", '"train"', 120)
    process.send_signal(signal.SIGUSR1)
    status, stderr = wait(process)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert status == 75 and log[-1]["event"] == "stopped" and log[-1]["signal"] == "SIGUSR1", stderr
    assert cluster.records("scontrol") == ["requeue 12345"]
    process = cluster.slurm(*options, does="", **env)
    _, stderr = process.communicate(timeout=300)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert process.returncode == 0 and log[-1]["event"] == "end", stderr
    assert [event["event"] for event in log if event["event"] in ("start", "resume")] == ["start", "resume"]
    assert len(cluster.records("scontrol")) == 1
