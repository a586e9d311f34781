"""The training path on a GPU: pytest -m gpu. The kernels' own cases are in test_kernels_triton.py."""

import json
from dataclasses import replace

import pytest
import torch

from fasttrain import prepare, recipes
from fasttrain import train as training
from fasttrain.checkpoints.run_dir import open_run
from fasttrain.config import toml
from fasttrain.config.choices import DECODERS
from fasttrain.config.schema import AugmentConfig, EmaConfig, InitConfig, MachineConfig, MixConfig
from fasttrain.data.index import scan
from fasttrain.distributed.ranks import Ranks
from fasttrain.losses.arcface import ArcFace
from fasttrain.losses.contrastive import Contrastive
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.losses.mean_teacher import MeanTeacher
from fasttrain.losses.symmetric import SymmetricCrossEntropy
from fasttrain.losses.triplet import Triplet
from fasttrain.models import Classifier
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder
from fasttrain.pipelines.eval_loader import EvalLoader
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.pipelines.views import views_by_name
from fasttrain.prepare import resolve_auto
from fasttrain.training import meter
from fasttrain.training.step import Step

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def index(demo_set):
    return scan(demo_set / "train")


def tiny(**changes):
    machine = MachineConfig(device="cuda", compile="off", log_steps=1000)
    recipe = replace(
        recipes.for_arch("test_resnet"), image_size=64, batch_size=50, epochs=1, machine=machine, **changes
    )
    return resolve_auto(recipe, GPU)


def safe_decoders():
    return [kind for kind in DECODERS if kind not in ("auto", *decoders.rule().refused)]


@pytest.mark.parametrize("kind", safe_decoders())
@pytest.mark.parametrize("policy", ["none", "imagenet"])
def test_batches_are_on_the_gpu_and_near_the_cpus(index, policy, kind):
    """nvJPEG rounds otherwise than libjpeg-turbo; without AutoAugment, which may amplify it, pixels stay close."""
    plan = Plan.of(tiny(augment=AugmentConfig(autoaugment=policy)), index)
    decoder = Decoder(kind, hardware_load=0.65)
    for ours, theirs in zip(
        batches(plan, index, GPU, 4, stop_step=4, decoder=decoder),
        batches(plan, index, torch.device("cpu"), 4, stop_step=4),
        strict=True,
    ):
        assert ours.pixels.device == GPU and ours.pixels.dtype == torch.uint8 and ours.pixels.is_contiguous()
        assert torch.equal(ours.numbers, theirs.numbers)
        difference = (ours.pixels.cpu().int() - theirs.pixels.int()).abs().float().mean()
        assert difference < (2 if policy == "none" else 12)


@pytest.mark.parametrize("kind", safe_decoders())
def test_evaluation_is_near_the_cpus(index, kind):
    decoder, views = Decoder(kind, hardware_load=0.65), views_by_name("center", 64)
    on_gpu = EvalLoader(index, views, 100, GPU, 4, decoder=decoder)
    on_cpu = EvalLoader(index, views, 100, torch.device("cpu"), 4)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert (ours.pixels[0].cpu().int() - theirs.pixels[0].int()).abs().float().mean() < 2


STEPS_ALIKE = 4  # steps until rounding, which every update amplifies, shows in a loss
SCRATCH = InitConfig(force_scratch=True)
STRONG = AugmentConfig(autoaugment="none", randaugment=2, erase=0.25)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"precision": precision, "micro_batch": micro}
            for precision in ("bf16", "fp16", "fp32")
            for micro in (0, 10)
        ),
        {"losses": (CrossEntropy(), Triplet()), "images_per_class": 5, "init": SCRATCH, "ema": EmaConfig(0.9)},
        {"losses": (CrossEntropy(), ArcFace()), "init": SCRATCH, "mix": MixConfig(cutmix=0.3, mixup=0.7)},
        {"losses": (SymmetricCrossEntropy(), Contrastive(), MeanTeacher()), "ema": EmaConfig(0.9), "augment": STRONG},
    ],
)
def test_no_step_waits_for_the_device(index, tmp_path, monkeypatch, changes):
    """torch raises at any synchronisation between a batch's arrival and the log point at the epoch's end."""
    honest_batches, honest_read = training.batches, meter.Meter.read

    def watched(*args, **settings):
        for batch in honest_batches(*args, **settings):
            torch.cuda.set_sync_debug_mode("error")
            yield batch
            torch.cuda.set_sync_debug_mode("default")

    def read(self, ranks):
        torch.cuda.set_sync_debug_mode("default")
        return honest_read(self, ranks)

    monkeypatch.setattr(training, "batches", watched)
    monkeypatch.setattr(meter.Meter, "read", read)
    recipe = tiny(**changes)
    start = open_run(tmp_path / "run", "auto", toml.to_toml(recipe))
    try:
        result = training.train(recipe, tmp_path / "run", index, None, Ranks(0, 1, 0, 1, GPU), start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.steps == 10


@pytest.mark.parametrize("micro_batch", [0, 10])
@pytest.mark.parametrize("how", ["on", "graphs"])
def test_a_compiled_run_computes_what_an_uncompiled_one_does(index, tmp_path, monkeypatch, how, micro_batch):
    """Losses of the first steps, in float32 without TF32; also with two views, an averaged network that answers, and
    weights of losses that follow the epoch."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses = (SymmetricCrossEntropy(), Contrastive(), MeanTeacher())
    told, steps = [], []
    monkeypatch.setattr(prepare, "Step", lambda *args: steps.append(Step(*args)) or steps[-1])
    for compiled in ("off", how):
        machine = MachineConfig(compile=compiled, log_steps=1)
        recipe = tiny(losses=losses, ema=EmaConfig(0.9), micro_batch=micro_batch)
        recipe = replace(recipe, precision="fp32", machine=machine, epochs=2)
        start = open_run(tmp_path / compiled, "never", toml.to_toml(recipe))
        training.train(recipe, tmp_path / compiled, index, None, Ranks(0, 1, 0, 1, GPU), start)
        lines = map(json.loads, (tmp_path / compiled / "log.jsonl").read_text().splitlines())
        told.append([line["terms"] for line in lines if line["event"] == "train"])
    for plain, compiled in list(zip(*told, strict=True))[:STEPS_ALIKE]:
        assert compiled == pytest.approx(plain, rel=2e-3)
    graphs = steps[-1].graphs
    assert (graphs is None) == (how == "on") and (graphs is None or graphs.complete)


@pytest.mark.parametrize(
    "changes", [{}, {"losses": (CrossEntropy(0.1), Triplet(), ArcFace()), "images_per_class": 5, "ema": EmaConfig(0.9)}]
)
def test_replayed_steps_wait_for_nothing(index, changes):
    """torch raises at any wait once both kinds of steps are recorded."""
    recipe = tiny(mix=MixConfig(cutmix=0.5), **changes)
    recipe = replace(recipe, epochs=4, machine=replace(recipe.machine, compile="graphs"))
    plan = Plan.of(recipe, index)
    model = Classifier.of(recipe, len(index.classes))
    step = Step(recipe, plan, model, torch.from_numpy(index.labels), Ranks(0, 1, 0, 1, GPU))
    assert step.graphs is not None
    replayed = 0
    for number, images in enumerate(batches(plan, index, GPU, 4)):
        if len(step.graphs.recorded) < 2:
            step(number, iter([images]))
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(number, iter([images]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        replayed += 1
    assert replayed >= 20
    reading = step.meter.read(step.ranks)
    assert reading.means.keys() >= {loss.name for loss in recipe.losses} and not reading.failed
