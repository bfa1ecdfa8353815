"""Norm and clipping without Transformer Engine and apex: megatron-core's numbers, without its reads."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor

from sdpg_megatron.mcore import gradient_norm

ARGUMENTS = 2048, torch.zeros(1, dtype=torch.int)


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in (3, 1000, 1)]


def test_the_norm_is_megatrons() -> None:
    with mock.patch.object(torch, "tensor", lambda *args, device=None, **more: torch.as_tensor(*args, **more)):
        expected, _ = local_multi_tensor_l2_norm(*ARGUMENTS, [gradients()], False)
    found, _ = gradient_norm.l2_norm(*ARGUMENTS, [gradients()], False)
    assert found.shape == (1,) and torch.equal(found, expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_scaled_gradients_are_megatrons(in_place: bool) -> None:
    expected, sources = gradients(), gradients()
    local_multi_tensor_scale(*ARGUMENTS, [expected, expected], 0.3)
    targets = sources if in_place else [torch.empty_like(source) for source in sources]
    gradient_norm.scale(*ARGUMENTS, [sources, targets], 0.3)
    assert all(map(torch.equal, targets, expected))
    assert in_place or all(map(torch.equal, sources, gradients()))


def test_no_number_is_read_from_the_device() -> None:
    """Tensors without numbers are enough."""
    with mock.patch.multiple(
        clip_grads, l2_norm_impl=local_multi_tensor_l2_norm, multi_tensor_scale_impl=local_multi_tensor_scale
    ):
        gradient_norm.install()
        on_device = [gradient.to("meta") for gradient in gradients()]
        norm, _ = clip_grads.l2_norm_impl(*ARGUMENTS, [on_device], False)
        clip_grads.multi_tensor_scale_impl(*ARGUMENTS, [on_device, on_device], 0.3)
    assert norm.is_meta


def test_apex_and_transformer_engine_keep_their_kernels() -> None:
    kernels = mock.sentinel.norm, mock.sentinel.scale
    with mock.patch.multiple(clip_grads, l2_norm_impl=kernels[0], multi_tensor_scale_impl=kernels[1]):
        gradient_norm.install()
        assert (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl) == kernels
