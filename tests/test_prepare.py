"""How `auto` is resolved for each device; needs no GPU."""

from dataclasses import replace

import pytest
import torch
from helpers import CPU as ALONE
from helpers import index_of, tiny

from fasttrain import recipes
from fasttrain.config import toml
from fasttrain.config.schema import MachineConfig, MixConfig
from fasttrain.losses.contrastive import Contrastive
from fasttrain.pipelines import decoders
from fasttrain.pipelines.plan import Plan
from fasttrain.prepare import check, classes_line, decoder_of, resolve_auto
from fasttrain.utils.errors import UserError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["bf16", "no-bf16"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    return request.param


def test_auto_on_a_gpu(has_bf16):
    resolved = resolve_auto(recipes.for_arch("resnest101e"), GPU)
    assert resolved.precision == ("bf16" if has_bf16 else "fp16") and resolved.machine.compile == "on"
    assert resolved.machine.decoder == decoders.rule().auto == decoder_of(resolved, GPU).kind


def test_auto_on_a_cpu():
    resolved = resolve_auto(recipes.for_arch("tresnet_xl"), CPU)
    assert resolved.precision == "fp32"
    assert (resolved.machine.compile, resolved.machine.decoder, resolved.machine.align) == ("off", "cpu", "off")


@pytest.mark.parametrize(
    ("arch", "precision", "align", "expected"),
    [
        ("tresnet_xl", "auto", "auto", "on"),
        ("tresnet_m", "fp16", "auto", "on"),
        ("tresnet_xl", "fp32", "auto", "off"),
        ("resnest101e", "auto", "auto", "off"),
        ("tresnet_xl", "auto", "off", "off"),
        ("tresnet_xl", "fp32", "on", "on"),
    ],
)
def test_widths_are_aligned_for_tensor_cores(has_bf16, arch, precision, align, expected):
    recipe = replace(recipes.for_arch(arch), precision=precision, machine=MachineConfig(align=align))
    assert resolve_auto(recipe, GPU).machine.align == expected


@pytest.mark.parametrize(("written", "read"), [("true", "on"), ("false", "off"), ('"auto"', "auto"), ('"on"', "on")])
def test_align_also_takes_true_and_false(written, read):
    text = f'arch = "tresnet_xl"\n[machine]\nalign = {written}\n'
    assert toml.from_toml(text).machine.align == read
    assert toml.override(recipes.for_arch("tresnet_xl"), f"machine.align={written}").machine.align == read


def test_a_decoder_that_is_known_to_crash_is_refused(has_bf16, monkeypatch):
    monkeypatch.setattr(decoders, "nvimagecodec", lambda: "0.9.0")
    recipe = replace(recipes.for_arch("resnet18"), machine=MachineConfig(decoder="gpu-region"))
    with pytest.raises(UserError, match="nvImageCodec#55"):
        resolve_auto(recipe, GPU)
    assert resolve_auto(recipe, CPU).machine.decoder == "cpu"


def test_on_a_cpu_every_recipe_decodes_on_the_cpu():
    for decoder in ("auto", "gpu", "gpu-hardware"):
        recipe = replace(recipes.for_arch("resnet18"), machine=MachineConfig(decoder=decoder))
        assert decoder_of(recipe, CPU).kind == "cpu"


def test_the_input_is_checked_with_all_views_of_its_images(index):
    """One image at a time has too few rows for BatchNorm after the last stage; two views of it have enough."""
    one = tiny(micro_batch=1, batch_size=2)
    with pytest.raises(UserError, match="does not take one image of 32 x 32 pixels at once"):
        check(one, index, ALONE)
    two_views = replace(one, losses=(*one.losses, Contrastive()), micro_batch=1, batch_size=2, mix=MixConfig(cutmix=0))
    assert check(two_views, index, replace(ALONE, world=2)).output.logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("sizes", "settings", "parts"),
    [
        ((9, 9, 5), [], []),
        ((60, 9, 5), [], ["the classes have 5 to 60 images, 12 to 1; ", "logit_adjustment=1", "balanced_accuracy"]),
        ((80, 20, 5), ["data.balance=0.5"], ["5 to 80 images, 16 to 1; drawn with data.balance=0.5, 4 to 1"]),
        ((80, 80), ["losses.cross_entropy.class_weights=auto"], ["weighted by losses.cross_entropy.class_weights"]),
        ((80, 5), ["losses.cross_entropy.logit_adjustment=2"], ["16 to 1; adjusted by ", "logit_adjustment=2"]),
    ],
)
def test_a_run_says_how_unequal_the_classes_are(sizes, settings, parts):
    recipe = toml.override(replace(recipes.for_arch("resnet18"), batch_size=8), *settings)
    index = index_of(*sizes)
    line = classes_line(Plan.of(recipe, index), recipe, index)
    assert all(part in line for part in parts) and bool(line) == bool(parts)
