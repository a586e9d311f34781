"""What a run changes as it trains, and a checkpoint keeps."""

from dataclasses import dataclass

import torch
from torch import nn

from fasttrain.training.ema import Ema


@dataclass(frozen=True)
class State:
    """What a run changes as it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
