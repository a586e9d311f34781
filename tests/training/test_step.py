"""A training step against a plain loop with torch's optimizer, which shares only the plan with the project."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttrain import recipes
from fasttrain.config.schema import InitConfig, MachineConfig, MixConfig, OptimConfig
from fasttrain.data.scan import scan
from fasttrain.distributed.ranks import Ranks
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.prepare import resolve_auto
from fasttrain.training.optim import lr_at
from fasttrain.training.step import Step, generator_seed

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
STEPS = 6


def mix_in_a_loop(pixels, labels, params, classes, smoothing):
    """Normalized images [B, 3, H, W] and targets [B, K], image by image in float64."""
    images = (pixels.numpy() / 255 - MEAN) / STD
    size, off_target = images.shape[1], smoothing / (classes - 1)
    mixed: list[np.ndarray] = []
    targets = []
    for original, (partner, mode, top, bottom, left, right, lam) in zip(images, params.tolist(), strict=True):
        other, share = images[int(partner)], 1.0
        image = original.copy()
        if mode == 1:
            box = slice(int(top), int(bottom)), slice(int(left), int(right))
            image[box] = other[box]
            share = 1 - (bottom - top) * (right - left) / size**2
        elif mode == 2:
            image, share = lam * original + (1 - lam) * other, lam
        target = np.full(classes, off_target)
        target[labels[len(mixed)]] += share * (1 - smoothing - off_target)
        target[labels[int(partner)]] += (1 - share) * (1 - smoothing - off_target)
        mixed.append(image)
        targets.append(target)
    return torch.from_numpy(np.stack(mixed)).float().permute(0, 3, 1, 2), torch.from_numpy(np.stack(targets))


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_a_step_equals_a_plain_loop(demo_set, micro_batch):
    index = scan(demo_set / "train")
    recipe = replace(
        recipes.for_arch("test_resnet"),
        batch_size=10,
        image_size=32,
        epochs=1,
        micro_batch=micro_batch,
        mix=MixConfig(cutmix=0.4, mixup=0.3),
        optim=OptimConfig(warmup_epochs=0.1, lr=0.1, lr_batch=0, weight_decay=1e-2),
        init=InitConfig(force_scratch=True),
        machine=MachineConfig(device="cpu", compile="off", workers=1),
    )
    recipe = resolve_auto(recipe, ALONE.device)
    plan, classes = Plan.of(recipe, index), len(index.classes)
    torch.manual_seed(3)
    model = Classifier.of(recipe, classes)
    reference = copy.deepcopy(model).train()
    step = Step(recipe, plan, model, index, ALONE)
    loader, reference_loader = (batches(plan, index, ALONE.device, 1, stop_step=STEPS) for _ in range(2))
    sgd = torch.optim.SGD(reference.parameters(), momentum=0.9, weight_decay=1e-2)
    modes = set()
    for number in range(STEPS):
        loss = step(number, loader).item()
        losses = []
        sgd.zero_grad()
        for micro in range(plan.micro_batches):
            pixels, indices = next(reference_loader)
            params = plan.mix_params(number, micro)[0]
            modes |= set(params[:, 1].tolist())
            images, targets = mix_in_a_loop(pixels, index.labels[indices], params, classes, 0.1)
            losses.append(-(targets * reference(images).logits.double().log_softmax(1)).sum(1).mean())
            (losses[-1] / plan.micro_batches).backward()
        sgd.param_groups[0]["lr"] = lr_at(number, steps=plan.steps, warmup_steps=5, peak=0.1)
        sgd.step()
        assert loss == pytest.approx(sum(value.item() for value in losses) / len(losses), rel=1e-5)
    assert modes == {0.0, 1.0, 2.0}
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), name


def test_every_step_and_rank_has_its_own_seed():
    """So that dropout differs between ranks and steps."""
    seeds = {
        generator_seed(seed, step, Ranks(rank, 4, rank, 4, ALONE.device))
        for seed in (0, 1)
        for step in range(100)
        for rank in range(4)
    }
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert generator_seed(2**63 - 1, 5, ALONE) < 2**63
