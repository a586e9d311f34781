"""Training on a GPU: pytest -m gpu. The tests in tests/kernels cover the kernels."""

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
from fasttrain.data.scan import scan
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
def test_batches_are_close_to_the_cpu_pipeline(index, policy, kind):
    """nvJPEG and libjpeg-turbo round differently. AutoAugment may amplify the differences."""
    plan = Plan.of(tiny(augment=AugmentConfig(autoaugment=policy)), index)
    decoder = Decoder(kind, hardware_load=0.65)
    for on_gpu, on_cpu in zip(
        batches(plan, index, GPU, 4, stop_step=4, decoder=decoder),
        batches(plan, index, torch.device("cpu"), 4, stop_step=4),
        strict=True,
    ):
        assert on_gpu.pixels.device == GPU and on_gpu.pixels.dtype == torch.uint8 and on_gpu.pixels.is_contiguous()
        assert torch.equal(on_gpu.indices, on_cpu.indices)
        difference = (on_gpu.pixels.cpu().int() - on_cpu.pixels.int()).abs().float().mean()
        assert difference < (2 if policy == "none" else 12)


@pytest.mark.parametrize("kind", safe_decoders())
def test_evaluation_crops_are_close_to_the_cpu_pipeline(index, kind):
    decoder, views = Decoder(kind, hardware_load=0.65), views_by_name("center", 64)
    gpu_loader = EvalLoader(index, views, 100, GPU, 4, decoder=decoder)
    cpu_loader = EvalLoader(index, views, 100, torch.device("cpu"), 4)
    for on_gpu, on_cpu in zip(gpu_loader, cpu_loader, strict=True):
        assert (on_gpu.pixels[0].cpu().int() - on_cpu.pixels[0].int()).abs().float().mean() < 2


COMPARED_STEPS = 4  # every update amplifies rounding, which shows in the losses of later steps
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
    """torch raises at any synchronization between the arrival of a batch and the log point at the end of the epoch."""
    original_batches, original_read = training.batches, meter.Meter.read

    def batches_in_error_mode(*args, **settings):
        for batch in original_batches(*args, **settings):
            torch.cuda.set_sync_debug_mode("error")
            yield batch
            torch.cuda.set_sync_debug_mode("default")

    def read(self, ranks):
        torch.cuda.set_sync_debug_mode("default")
        return original_read(self, ranks)

    monkeypatch.setattr(training, "batches", batches_in_error_mode)
    monkeypatch.setattr(meter.Meter, "read", read)
    recipe = tiny(**changes)
    start = open_run(tmp_path / "run", "auto", toml.to_toml(recipe))
    try:
        result = training.train(recipe, tmp_path / "run", index, None, Ranks(0, 1, 0, 1, GPU), start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.steps == 10


@pytest.mark.parametrize("micro_batch", [0, 10])
@pytest.mark.parametrize("compile_mode", ["on", "graphs"])
def test_compiled_losses_equal_uncompiled_ones(index, tmp_path, monkeypatch, compile_mode, micro_batch):
    """Losses of the first steps, in float32 without TF32, with two views, an averaged network as a teacher, and loss
    weights that depend on the epoch."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses = (SymmetricCrossEntropy(), Contrastive(), MeanTeacher())
    terms, steps = [], []
    monkeypatch.setattr(prepare, "Step", lambda *args: steps.append(Step(*args)) or steps[-1])
    for mode in ("off", compile_mode):
        machine = MachineConfig(compile=mode, log_steps=1)
        recipe = tiny(losses=losses, ema=EmaConfig(0.9), micro_batch=micro_batch)
        recipe = replace(recipe, precision="fp32", machine=machine, epochs=2)
        start = open_run(tmp_path / mode, "never", toml.to_toml(recipe))
        training.train(recipe, tmp_path / mode, index, None, Ranks(0, 1, 0, 1, GPU), start)
        lines = map(json.loads, (tmp_path / mode / "log.jsonl").read_text().splitlines())
        terms.append([line["terms"] for line in lines if line["event"] == "train"])
    for plain, compiled in list(zip(*terms, strict=True))[:COMPARED_STEPS]:
        assert compiled == pytest.approx(plain, rel=2e-3)
    graphs = steps[-1].graphs
    assert (graphs is None) == (compile_mode == "on") and (graphs is None or graphs.complete)


@pytest.mark.parametrize(
    "changes", [{}, {"losses": (CrossEntropy(0.1), Triplet(), ArcFace()), "images_per_class": 5, "ema": EmaConfig(0.9)}]
)
def test_replayed_steps_do_not_wait(index, changes):
    """torch raises at any synchronization once both kinds of steps are recorded."""
    recipe = tiny(mix=MixConfig(cutmix=0.5), **changes)
    recipe = replace(recipe, epochs=4, machine=replace(recipe.machine, compile="graphs"))
    plan = Plan.of(recipe, index)
    model = Classifier.of(recipe, len(index.classes))
    step = Step(recipe, plan, model, index, Ranks(0, 1, 0, 1, GPU))
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
    assert reading.means.keys() >= {loss.name for loss in recipe.losses} and not reading.failures
