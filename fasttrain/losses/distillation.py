"""Knowledge distillation: the network learns a trained teacher's answers to the same images."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from fasttrain.losses.base import Batch, Loss, Output, Term, at_least_float32
from fasttrain.utils.errors import UserError


@dataclass(frozen=True)
class Distillation(Loss):
    """Knowledge distillation: KL divergence from a trained teacher's answers to the same images.

    Mean over the batch of T²·KL(softmax(teacher/T) ‖ softmax(student/T)), T being the temperature. The teacher is any
    network with the same classes. It is frozen, in eval mode, and sees the same pixels as the student, mixed or not.
    Computed in float32. Hinton et al. 2015 (arXiv 1503.02531); Bag of Tricks, section 5.3, uses T = 20.
    """

    teacher: str = ""
    """Teacher: a run's folder, or a checkpoint in it."""
    temperature: float = 20.0
    """Softens both distributions; above 0."""
    weight: float = 1.0
    """Factor of this loss."""

    name: ClassVar[str] = "distillation"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def teacher_run(self) -> str:
        if not self.teacher:
            raise UserError("distillation needs a teacher: --set losses.distillation.teacher=CKPT")
        return self.teacher

    def __call__(self, output: Output, batch: Batch) -> Term:
        if batch.teacher_logits is None:
            raise ValueError("Distillation needs the teacher's logits")
        student = F.log_softmax(at_least_float32(output.logits) / self.temperature, dim=1)
        teacher = F.log_softmax(at_least_float32(batch.teacher_logits) / self.temperature, dim=1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return Term(self.weight * self.temperature**2 * divergence)
