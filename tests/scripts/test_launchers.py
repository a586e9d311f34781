"""scripts/slurm.sh, torchrun_status.sh and kubernetes.yaml without a cluster: with programs that stand in for it."""

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

SCRIPTS = ROOT / "scripts"
PROGRAMS = {
    # As srun does: sets the variables of a task, and sends signals on to it (by becoming it).
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >>"$TOLD/srun"; shift; done
        export SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=localhost
        exec "$@"
    """,
    "scontrol": """
        [ "$1" != show ] || { echo localhost; exit; }
        echo "$*" >>"$TOLD/scontrol"
    """,
    # As torchrun does: ends with 1 upon a signal, once its ranks have stopped.
    "torchrun": """
        printf '%s\\n' "$@" >"$TOLD/arguments"
        env >"$TOLD/environment"
        log=$TOLD/run/log.jsonl
        stop() {
            echo "$1" >>"$TOLD/signals"
            sleep 0.3  # time for another signal to come
            line='{"event": "stopped", "step": 7, "signal": "SIG'$1'"}'
            if [ -n "${LAG:-}" ]; then { sleep "$LAG"; echo "$line" >>"$log"; } & else echo "$line" >>"$log"; fi
            exit 1
        }
        trap 'stop USR1' USR1
        trap 'stop TERM' TERM
        mkdir -p "$TOLD/run"
        [ "$DOES" != fail ] || exit 3
        echo '{"event": "start", "step": 0}' >>"$log"
        [ "$DOES" != crash ] || exit 1
        touch "$TOLD/ready"
        while [ "$DOES" = train ]; do sleep 0.05; done
        echo '{"event": "end", "step": 9}' >>"$log"
    """,
}


class Stage:
    """A folder with the programs, in which a script is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name, text in PROGRAMS.items():
            (self.programs / name).write_text("#!/usr/bin/env bash\n" + text)
            (self.programs / name).chmod(0o755)

    def start(self, *command: object, does: str, **env: str) -> subprocess.Popen:
        full = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "TOLD": str(self.folder), "DOES": does,
                "GPUS": "2", "SLURM_JOB_ID": "12345", "PATIENCE": "0", **env}  # fmt: skip
        return subprocess.Popen(["bash", *map(str, command)], cwd=ROOT, env=full, stderr=subprocess.PIPE, text=True)

    def slurm(self, *options: object, does: str, **env: str) -> subprocess.Popen:
        options = options or ("--arch", "test_resnet", "--out", self.folder / "run")
        return self.start(SCRIPTS / "slurm.sh", *options, does=does, **env)

    def signal(self, process: subprocess.Popen, *numbers: signal.Signals) -> None:
        await_file(self.folder / "ready")
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)

    def told(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def await_file(path: Path, holds: str = "", seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and holds in path.read_text()):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


def ends(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def test_slurms_signal_reaches_torchrun_once_and_the_job_is_queued_again(stage):
    process = stage.slurm(does="train")
    stage.signal(process, signal.SIGUSR1, signal.SIGUSR1)
    status, said = ends(process)
    assert status == 75 and "back into the queue" in said
    assert stage.told("scontrol") == ["requeue 12345"]
    assert stage.told("signals") == ["USR1"]
    assert "--kill-on-bad-exit=0" in stage.told("srun")


def test_a_run_that_ends_is_not_queued_again(stage):
    assert ends(stage.slurm(does="end")) == (0, "") and not stage.told("scontrol")


@pytest.mark.parametrize(("does", "status"), [("fail", 3), ("crash", 1)])
def test_a_run_that_fails_is_not_queued_again_though_it_was_stopped_before(stage, does, status):
    """The last line of an earlier run does not count."""
    (stage.folder / "run").mkdir()
    (stage.folder / "run" / "log.jsonl").write_text('{"event": "stopped", "step": 7, "signal": "SIGUSR1"}\n')
    assert ends(stage.slurm(does=does))[0] == status and not stage.told("scontrol")


def test_a_job_that_is_cancelled_stays_so(stage):
    """SLURM sends SIGTERM to the tasks, not SIGUSR1 to the script."""
    process = stage.slurm(does="train")
    await_file(stage.folder / "ready")
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(task), signal.SIGTERM)
    assert ends(process)[0] == 75 and not stage.told("scontrol") and stage.told("signals") == ["TERM"]


def test_a_log_that_lags_behind_is_waited_for(stage):
    process = stage.slurm(does="train", LAG="1.5", PATIENCE="20")
    stage.signal(process, signal.SIGUSR1)
    assert ends(process)[0] == 75 and stage.told("scontrol")


@pytest.mark.parametrize("form", [["--out", "OUT"], ["--out=OUT"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_status_of_a_run_that_was_stopped(stage, form, number):
    options = [each.replace("OUT", str(stage.folder / "run")) for each in form]
    process = stage.start(SCRIPTS / "torchrun_status.sh", "torchrun", *options, does="train")
    if number == signal.SIGINT:  # of which this torchrun knows nothing, as a shell's background job
        stage.signal(process, number, signal.SIGTERM)
    else:
        stage.signal(process, number)
    assert ends(process)[0] == 75 and stage.told("signals") == ["TERM"]


def test_wrong_arguments_are_one_line(stage):
    for options in (["--arch", "x"], ["--out", "x", "--resume", "never"]):
        status, said = ends(stage.start(SCRIPTS / "torchrun_status.sh", "torchrun", *options, does="end"))
        assert status == 2 and len(said.splitlines()) == 1
    assert not stage.told("arguments")


def run_options(arguments: list[str]) -> dict:
    """What the options after `-m fasttrain run` stand for. Raises where there is no such option."""
    at = arguments.index("fasttrain")
    assert arguments[at - 1] == "-m" and arguments[at + 1] == "run"
    command = main.commands["run"]
    return command.make_context("run", arguments[at + 2 :]).params


def test_torchrun_takes_the_options_and_the_signals(stage, monkeypatch):
    assert ends(stage.slurm(does="end"))[0] == 0
    from torch.distributed.run import get_args_parser

    environment = dict(line.split("=", 1) for line in stage.told("environment") if "=" in line)
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", environment["PET_SIGNALS_TO_HANDLE"])
    found = get_args_parser().parse_args(stage.told("arguments"))
    assert "SIGUSR1" in found.signals_to_handle.split(",") and found.nnodes == "1"
    assert found.master_port == 20000 + 12345 % 10000
    assert run_options(stage.told("arguments"))["out"] == str(stage.folder / "run")


def seconds_of_slurm() -> int:
    found = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", (SCRIPTS / "slurm.sh").read_text(), re.M)
    assert found
    return int(found[1])


def test_ranks_may_save_for_as_long_as_there_is_time():
    told = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", (SCRIPTS / "slurm.sh").read_text())
    assert told and int(told[1]) < seconds_of_slurm()
    lines = (SCRIPTS / "slurm.sh").read_text().splitlines()
    first_command = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(at for at, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command  # sbatch stops there


# ---- Kubernetes


@pytest.fixture(scope="module")
def objects() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())}


def test_the_parts_of_the_manifest_fit_together(objects):
    assert objects.keys() == {"Service", "Job"}
    service, job = objects["Service"], objects["Job"]
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["restartPolicy"] == "Never"  # or podFailurePolicy is refused
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert rules[1]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    volumes = {each["name"] for each in pod["volumes"]}
    mounts = {each["name"]: each for each in container["volumeMounts"]}
    assert volumes == mounts.keys() and mounts["data"]["readOnly"] and mounts["shm"]["mountPath"] == "/dev/shm"
    env = {each["name"]: each for each in container["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"]) < pod["terminationGracePeriodSeconds"]


def test_the_pods_command(objects, stage):
    """Its options exist, for torchrun and for the run; SIGTERM to process 1 reaches torchrun; the status is 75."""
    from torch.distributed.run import get_args_parser

    job = objects["Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    command = [each.replace("$(NODE_RANK)", "1") for each in container["command"]]
    assert "$(" not in " ".join(command) and (ROOT / command[1]).is_file()
    torchrun = get_args_parser().parse_args(command[3:])
    assert int(torchrun.nnodes) == job["spec"]["completions"] and torchrun.node_rank == 1
    assert int(torchrun.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert torchrun.master_addr == f"{job['metadata']['name']}-0.{objects['Service']['metadata']['name']}"
    options = run_options(command)
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert options["data"][0] in mounts and os.path.dirname(options["out"]) in mounts

    process = stage.start(*[each.replace("/out", str(stage.folder)) for each in command[1:]], does="train")
    stage.signal(process, signal.SIGTERM)
    assert ends(process)[0] == 75 and stage.told("signals") == ["TERM"]


# ---- with torchrun itself


@pytest.mark.slow
def test_two_ranks_stop_save_and_go_on(stage, demo_set):
    """Twice through slurm.sh: the signal before the time limit, then up to the end."""
    (stage.programs / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    out = stage.folder / "run"
    options = ["--arch", "test_resnet", "--image-size", 32, "--batch-size", 50, "--epochs", 20, "--device", "cpu"]
    options += ["--workers", 1, "--data", demo_set / "train", "--out", out, "--set", "machine.log_steps=2"]
    env = {"OMP_NUM_THREADS": "1", "PATIENCE": "30", "PORT": "29777"}
    process = stage.slurm(*options, does="", **env)
    await_file(out / "log.jsonl", '"train"', 120)
    process.send_signal(signal.SIGUSR1)
    status, said = ends(process)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert status == 75 and log[-1]["event"] == "stopped" and log[-1]["signal"] == "SIGUSR1", said
    assert stage.told("scontrol") == ["requeue 12345"]
    process = stage.slurm(*options, does="", **env)
    _, said = process.communicate(timeout=300)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert process.returncode == 0 and log[-1]["event"] == "end", said
    assert [each["event"] for each in log if each["event"] in ("start", "resume")] == ["start", "resume"]
    assert len(stage.told("scontrol")) == 1
