"""Replayed steps, on a CPU. `Tape` stands in for CUDA graphs: it records the operations, their memory and their order,
and no Python. As in a graph, a value from the host is fixed when the step is recorded."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import part_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.config import toml
from fasttrain.config.schema import EmaConfig, MachineConfig, MixConfig, OptimConfig
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.prepare import resolve_auto
from fasttrain.training.cuda_graphs import PATIENCE, WARM_UP, Graphs
from fasttrain.training.inputs import HostBatch, StepScalars
from fasttrain.training.step import Step, require_replayable
from fasttrain.utils.errors import UserError

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
STEPS = 14
# Operations that read values on the host, make constants there, or have a result whose shape depends on values.
NOT_RECORDABLE = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "lift_fresh",
)


class Tape(TorchDispatchMode):
    """Records every operation on tensors. Like a CUDA graph, it refuses operations that read a value or a number of
    values on the host, or make a constant there."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index.dtype == torch.bool for index in args[1] if index is not None)
        assert not by_mask and name not in NOT_RECORDABLE, f"cannot be recorded: {func}"
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            new_result = func(*args, **kwargs)
            for recorded, new in zip(tensors(result), tensors(new_result), strict=True):
                if recorded.data_ptr() != new.data_ptr():
                    recorded.detach().copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class TapeRecorder:
    """Records on tapes. Recording on a tape also runs the work, so the first replay does nothing."""

    def __init__(self):
        self.tapes: list[Tape] = []
        self.ran = self.replayed = 0

    def run(self, work):
        self.ran += 1
        return work()

    def record(self, work):
        with Tape() as tape:
            result = work()
        self.tapes.append(tape)
        before = self.replayed

        def replay():
            if self.replayed > before:
                tape.replay()
            self.replayed += 1

        return result, replay


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 12)


def train_steps(recipe, index, recorder, callback):
    """A Step after STEPS steps, eager or with a recorder. callback: called before each step and after the last."""
    torch.manual_seed(5)
    plan = Plan.of(recipe, index)
    step = Step(recipe, plan, Classifier.of(recipe, len(index.classes)), index, ALONE)
    if recorder is not None:
        step.graphs = Graphs(CPU, recipe.mix.kinds, recorder)
    loader = batches(plan, index, CPU, 1, stop_step=STEPS)
    for number in range(STEPS):
        callback(number, step)
        step(number, loader)
    callback(STEPS, step)
    return step


CASES: dict[str, dict[str, Any]] = {
    "CutMix and mixup": {"mix": MixConfig(cutmix=0.4, mixup=0.3)},
    "accumulation": {"mix": MixConfig(cutmix=0.5), "micro_batch": 6},
    "never mixed": {"mix": MixConfig(cutmix=0), "losses": (CrossEntropy(), Triplet()), "images_per_class": 4},
    "triplet and ArcFace": {
        "mix": MixConfig(cutmix=0.5),
        "losses": (CrossEntropy(), Triplet(), ArcFace()),
        "images_per_class": 4,
    },
    "views, mean teacher, loss weights that follow the epoch": {
        "mix": MixConfig(cutmix=0.5),
        "losses": (SymmetricCrossEntropy(), Contrastive(decay="cosine"), MeanTeacher(ramp_epochs=2)),
        "ema": EmaConfig(0.8),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_equal_eager_steps(index, case):
    """Weights, momentum, averages, statistics and all metrics, with learning rates that change."""
    recipe = tiny(
        epochs=20,
        batch_size=12,
        optim=OptimConfig(warmup_epochs=5, lr=0.2, lr_batch=0),
        machine=MachineConfig(device="cpu", compile="off", log_steps=STEPS),
        **CASES[case],
    )
    recipe = resolve_auto(recipe, CPU)
    tape_recorder = TapeRecorder()
    norms: dict[bool, list[float]] = {True: [], False: []}

    def callback(number, step):
        if number:
            norms[step.graphs is None].append(float(sum(step.guard.norms.values())))

    eager, replayed = (train_steps(recipe, index, recorder, callback) for recorder in (None, tape_recorder))
    kinds = len(tape_recorder.tapes)
    assert kinds == (1 if case == "never mixed" else 2)
    assert tape_recorder.ran >= kinds * WARM_UP and tape_recorder.replayed == STEPS - tape_recorder.ran >= 4
    assert norms[False] == pytest.approx(norms[True], rel=1e-4)
    for expected, actual in zip(vars(eager.state).values(), vars(replayed.state).values(), strict=True):
        compare(actual, expected)
    means = replayed.meter.read(ALONE).means
    assert means == pytest.approx(eager.meter.read(ALONE).means, rel=1e-4) and means["loss"] > 0


def compare(actual, expected):
    """Compare two networks, averages or optimizers; both may be missing. Scalers are disabled."""
    if actual is None:
        assert expected is None
        return
    if isinstance(actual, torch.amp.GradScaler):
        assert actual.state_dict() == expected.state_dict() == {}
        return
    states = [(part.model if hasattr(part, "model") else part).state_dict() for part in (actual, expected)]
    actual_tensors, expected_tensors = map(tensors, states)
    assert len(actual_tensors) > 10
    for one, other in zip(actual_tensors, expected_tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_replayed_step_that_is_not_finite_changes_nothing(index):
    machine = MachineConfig(device="cpu", compile="off", log_steps=STEPS)
    recipe = resolve_auto(tiny(batch_size=12, mix=MixConfig(cutmix=0), machine=machine, epochs=20), CPU)
    factor, states = torch.ones(()), []

    def callback(number, step):
        if number == 0:
            step.model.register_forward_pre_hook(lambda _, images: (images[0] * factor,))
        factor.fill_(float("nan") if number == STEPS - 2 else 1.0)
        states.append(copy.deepcopy(step.model.state_dict()))

    step = train_steps(recipe, index, TapeRecorder(), callback)
    for name, before in states[-3].items():
        assert torch.equal(states[-2][name], before), name
    assert not all(torch.equal(states[-1][name], tensor) for name, tensor in states[-2].items())
    assert list(step.meter.read(ALONE).failures) == [STEPS - 2]


def test_a_recording_fixes_values_from_the_host(index):
    """So a learning rate on the host would stay that of the recorded step."""
    weight = torch.zeros(2)
    rates = iter((1.0, 10.0, 100.0))
    result, replay = TapeRecorder().record(lambda: weight.add_(next(rates)))
    replay()
    replay()
    assert result is weight and weight.tolist() == [2.0, 2.0]
    for work in (
        lambda: weight.sum().item(),
        lambda: bool(weight[0] > 1),
        lambda: weight[weight > 1],
        lambda: torch.tensor([1.0]),
    ):
        with pytest.raises(AssertionError, match="cannot be recorded"):
            TapeRecorder().record(work)


def test_a_rare_kind_does_not_delay_recording_forever():
    count = torch.zeros(())
    tape_recorder = TapeRecorder()
    graphs = Graphs[torch.Tensor](CPU, {True, False}, tape_recorder)
    batch = HostBatch(torch.zeros(1, 2, 2, 3), torch.zeros(1), torch.zeros(1, 7), True)
    for step in range(PATIENCE + 5):
        graphs(lambda scalars, batches: count.add_(1), StepScalars(0.0, 0.0), 0.1, [batch._replace(mixed=step != 50)])
    assert tape_recorder.ran == PATIENCE and tape_recorder.replayed == 5 and not graphs.complete
    assert count == PATIENCE + 5


@pytest.mark.parametrize(
    ("setting", "needs"),
    [("precision=fp16", "precision bf16 or fp32"), ("optim.impl=apex", "optim.impl=torch")],
)
def test_settings_that_cannot_be_replayed_are_refused(index, setting, needs):
    recipe = toml.override(tiny(machine=MachineConfig(device="cpu", compile="graphs")), tuple(setting.split("=")))
    with pytest.raises(UserError, match=f"machine.compile=graphs replays whole steps and needs {needs}"):
        require_replayable(resolve_auto(recipe, CPU), ALONE)


def test_several_ranks_are_refused():
    recipe = resolve_auto(tiny(machine=MachineConfig(device="cpu", compile="graphs")), CPU)
    require_replayable(recipe, ALONE)
    with pytest.raises(UserError, match="needs one rank"):
        require_replayable(recipe, replace(ALONE, world=2))
