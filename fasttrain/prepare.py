"""What is resolved before a run starts."""

from dataclasses import replace

import torch

from fasttrain.config.schema import Recipe
from fasttrain.pipelines import decoders
from fasttrain.pipelines.decoders import Decoder


def resolve_auto(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` with what `auto` stands for on this device. Raises UserError for a decoder that is known to crash."""
    on_gpu = device.type == "cuda"
    half = "bf16" if not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = (half if on_gpu else "fp32") if recipe.precision == "auto" else recipe.precision
    machine = recipe.machine
    compiled = ("on" if on_gpu else "off") if machine.compile == "auto" else machine.compile
    decoder = decoders.resolve(machine.decoder, device)
    align = machine.align
    if align == "auto":
        align = "on" if on_gpu and precision != "fp32" and recipe.arch.startswith("tresnet") else "off"
    machine = replace(machine, compile=compiled, decoder=decoder, align=align)
    return replace(recipe, precision=precision, machine=machine)


def decoder_of(recipe: Recipe, device: torch.device) -> Decoder:
    """The decoder of a recipe, resolved or not, on this device."""
    return Decoder(decoders.resolve(recipe.machine.decoder, device), recipe.machine.hardware_load)
