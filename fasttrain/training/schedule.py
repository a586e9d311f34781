"""The learning rate as a pure function of the step."""

import math
from collections.abc import Sequence


def lr_at(
    step: int, *, steps: int, warmup_steps: int, peak: float, drops: Sequence[int] | None = None, factor: float = 0.1
) -> float:
    """Learning rate of step `step` (0-based) of `steps`: linear warm-up from 0, then a cosine to 0, both per step.

    Warm-up covers steps 0 … warmup_steps−1 and step `warmup_steps` runs at `peak`, as in the DeepBlueAI report
    (section III-B) and Goyal et al. 2017. A run no longer than its warm-up never reaches the peak. With `drops`, the
    rate after the warm-up is instead `peak`, times `factor` for each of those steps that has been reached.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if drops is not None:
        return peak * factor ** sum(step >= each for each in drops)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
