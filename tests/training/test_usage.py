"""What a command's training has used."""

import json
from dataclasses import dataclass

import pytest
from helpers import CPU, events, run, tiny

from fasttrain.training import usage
from fasttrain.training.usage import Usage


@dataclass(frozen=True)
class _Ranks:
    """Stands in for the first of several ranks. others: what the other ranks send."""

    others: tuple

    def gather(self, value):
        return [value, *self.others]


@pytest.mark.parametrize(
    ("others", "joules"),
    [((), 40.0), ((("b", 2.5),), 42.5), ((("a", 39.0),), 39.0), ((("b", None),), None)],
    ids=["one", "two GPUs", "two ranks on one GPU", "a GPU without a counter"],
)
def test_joules_are_summed_over_the_gpus(monkeypatch, others, joules):
    monkeypatch.setattr(usage.energy, "joules", lambda uuid: {"a": 140.0}.get(uuid))
    used = Usage(_Ranks(others), started=0.0, uuid="a", joules=100.0).so_far()
    assert used["seconds"] > 0 and used.get("joules") == joules


def test_a_run_on_a_cpu_logs_its_seconds_and_what_it_ran_on(index, tmp_path):
    run(tiny(), tmp_path / "run", index, index)
    first, *_, last = events(tmp_path / "run")
    assert first["cpu"]["cores"] >= 1 and first["cpu"]["model"]
    assert {"fasttrain", "torch", "timm", "nvidia-dali", "python"} == first["versions"].keys()
    assert "gpus" not in first and "joules" not in last
    assert last["event"] == "end" and 0 < last["seconds"] < 600
    assert Usage.start(CPU).so_far().keys() == {"seconds"}
    json.dumps(last)
