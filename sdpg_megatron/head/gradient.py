"""Gradients of the head's terms in the logits of one shard's columns.

With g_lp, g_H, g_kl the upstream gradients of log p(y), H and KL, and the symbols of `statistics`,

    dL/dz_v = e^(z_v-m) / S * [ g_kl ((z_v-m) - (u_v-n) - A/S) - g_lp - g_H ((z_v-m) - B/S) ] + g_lp 1[v = y]

No collective is needed: S, A and B are those of the whole vocabulary. Shapes as in `statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpg_megatron.head.statistics import locate, shift


def student_gradient(
    logits_CV: Tensor,
    labels_C: Tensor,
    student_4C: Tensor,
    *,
    logprob_grad_C: Tensor | None,
    entropy_grad_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient through log-prob and entropy. `logits_CV` become z - m in place.

    Args:
        labels_C: column in this shard, as in `student_statistics`.
        student_4C: joined statistics.

    Returns:
        gradient_CV and e^(z-m) [C, V].
    """
    max_C, sum_C, spread_C, _ = student_4C
    kind = logits_CV.dtype
    weight_CV = shift(logits_CV, max_C.to(kind)).exp()
    if logprob_grad_C is None:
        logprob_grad_C = torch.zeros_like(sum_C)
    level_C = -logprob_grad_C / sum_C
    if entropy_grad_C is None:
        gradient_CV = weight_CV * level_C.to(kind)[:, None]
    else:
        slope_C = -entropy_grad_C / sum_C
        level_C = level_C - slope_C * spread_C / sum_C
        gradient_CV = logits_CV * slope_C.to(kind)[:, None]
        gradient_CV.add_(level_C.to(kind)[:, None]).mul_(weight_CV)
    owned_C, column_C = locate(labels_C, logits_CV.shape[1])
    at_label_C = torch.where(owned_C, logprob_grad_C.to(kind), 0)
    return gradient_CV.scatter_add_(1, column_C[:, None], at_label_C[:, None]), weight_CV


def divergence_gradient(
    logits_GV: Tensor,
    shifted_GV: Tensor,
    weight_GV: Tensor,
    *,
    sum_G: Tensor,
    teacher_3G: Tensor,
    divergence_grad_G: Tensor,
) -> Tensor:
    """Gradient [G, V] through the divergence. The teacher's logits are overwritten.

    Args:
        shifted_GV: the student's z - m on the same rows; weight_GV: e^(z-m); sum_G: S; all of the joined statistics.
    """
    top_G, _, gap_G = teacher_3G
    kind = logits_GV.dtype
    # q = 0 occurs only with p = 0 here, or the forward pass had failed: any finite number gives the 0 it must give.
    logits_GV.sub_(top_G.to(kind)[:, None]).clamp_(min=torch.finfo(kind).min)
    torch.sub(shifted_GV, logits_GV, out=logits_GV)
    logits_GV.sub_((gap_G / sum_G).to(kind)[:, None]).mul_(weight_GV)
    return logits_GV.mul_((divergence_grad_G / sum_G).to(kind)[:, None])
