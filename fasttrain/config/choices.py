"""Values that both the settings and the command line list. This file imports nothing, so that `--help` is quick."""

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
COMPILE_MODES = ("auto", "on", "off", "graphs")
DECODERS = ("auto", "cpu", "gpu", "gpu-region", "gpu-hardware")  # see pipelines/decoders.py
ON_BAD = ("stop", "skip")
LINKS = ("inside", "follow")
LOSS_COMBINATIONS = ("ce", "ce+triplet", "ce+arcface")  # see recipes/deepblueai.py
