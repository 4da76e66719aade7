"""Knowledge distillation from soft labels, as SRe²L trains its students."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_label_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch, without the factor T² (SPEC §2, evaluate).

    Args:
        student, teacher: logits (N, classes).

    Returns:
        A scalar, in nats.
    """
    return F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
