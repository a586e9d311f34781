"""Values that both the settings and the command line list. This file imports nothing, so that `--help` is quick."""

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
COMPILE_MODES = ("auto", "on", "off", "graphs")
DECODERS = ("auto", "cpu", "gpu", "gpu-region", "gpu-hardware")  # see pipelines/decoders.py
ON_BAD = ("stop", "skip")
LINKS = ("inside", "follow")
CRITERIA = ("top1", "top5", "balanced_accuracy", "macro_f1", "log_loss", "calibration_error")  # of the best checkpoint
LOSS_COMBINATIONS = ("ce", "ce+triplet", "ce+arcface")  # see recipes/deepblueai.py
TRACKERS = ("wandb", "trackio", "mlflow")  # see training/trackers.py
