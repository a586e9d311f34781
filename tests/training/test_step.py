"""A training step, beside a loop written out with torch's own optimizer, and no part of the project's but the plan."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttrain import recipes
from fasttrain.config.schema import InitConfig, MachineConfig, MixConfig, OptimConfig
from fasttrain.data.index import scan
from fasttrain.distributed.ranks import Ranks
from fasttrain.models import Classifier
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.prepare import resolve_auto
from fasttrain.training.optim import lr_at
from fasttrain.training.step import Step

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
STEPS = 6


def mixed_by_hand(pixels, labels, params, classes, smoothing):
    """Normalised images [B, 3, H, W] and targets [B, K], image by image in float64."""
    images = (pixels.numpy() / 255 - MEAN) / STD
    size, wrong = images.shape[1], smoothing / (classes - 1)
    made: list[np.ndarray] = []
    targets = []
    for own, (partner, mode, top, bottom, left, right, lam) in zip(images, params.tolist(), strict=True):
        other, share = images[int(partner)], 1.0
        image = own.copy()
        if mode == 1:
            box = slice(int(top), int(bottom)), slice(int(left), int(right))
            image[box] = other[box]
            share = 1 - (bottom - top) * (right - left) / size**2
        elif mode == 2:
            image, share = lam * own + (1 - lam) * other, lam
        target = np.full(classes, wrong)
        target[labels[len(made)]] += share * (1 - smoothing - wrong)
        target[labels[int(partner)]] += (1 - share) * (1 - smoothing - wrong)
        made.append(image)
        targets.append(target)
    return torch.from_numpy(np.stack(made)).float().permute(0, 3, 1, 2), torch.from_numpy(np.stack(targets))


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_a_step_does_what_a_loop_written_out_does(demo_set, micro_batch):
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
    by_hand = copy.deepcopy(model).train()
    step = Step(recipe, plan, model, torch.from_numpy(index.labels), ALONE)
    feed, again = (batches(plan, index, ALONE.device, 1, stop_step=STEPS) for _ in range(2))
    sgd = torch.optim.SGD(by_hand.parameters(), momentum=0.9, weight_decay=1e-2)
    modes = set()
    for number in range(STEPS):
        found = step(number, feed).item()
        losses = []
        sgd.zero_grad()
        for micro in range(plan.micro_batches):
            pixels, numbers = next(again)
            params = plan.mix_params(number, micro)[0]
            modes |= set(params[:, 1].tolist())
            images, targets = mixed_by_hand(pixels, index.labels[numbers], params, classes, 0.1)
            losses.append(-(targets * by_hand(images).logits.double().log_softmax(1)).sum(1).mean())
            (losses[-1] / plan.micro_batches).backward()
        sgd.param_groups[0]["lr"] = lr_at(number, steps=plan.steps, warmup_steps=5, peak=0.1)
        sgd.step()
        assert found == pytest.approx(sum(each.item() for each in losses) / len(losses), rel=1e-5)
    assert modes == {0.0, 1.0, 2.0}
    expected = by_hand.state_dict()
    for name, each in model.state_dict().items():
        assert torch.allclose(each, expected[name], rtol=1e-3, atol=1e-5), name
