"""`tile_triton` on a GPU, at the sizes of a large vocabulary."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sdpg_megatron.head import tile
from sdpg_megatron.head.tile import WeightedLogRatio
from tests.head_tiles import MARGIN, PARTS, Tiles, check_gradient, check_measure, check_mixture, make_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")]

ROWS, COLUMNS = 64, 151936
LARGE = 14
"""GiB for two rows that lie 2^31 numbers apart, and some to spare."""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from sdpg_megatron.head import tile_triton

    assert tile_triton.available(torch.device("cuda"))
    return tile_triton


@pytest.fixture(scope="module", params=[COLUMNS, COLUMNS // 8 - 3], ids=["whole", "odd shard"])
def tiles(request: pytest.FixtureRequest) -> Tiles:
    """Rows in three parts: logits as models have them, the same with an offset of 1000, and some columns at -inf."""
    generator = torch.Generator("cuda").manual_seed(0)

    def logits() -> Tensor:
        made_CW = 3 * torch.randn(ROWS, request.param + 2 * MARGIN, generator=generator, device="cuda")
        made_CW[20:40] += 1000
        return made_CW.clamp(-15, 1015)

    student_CW, teacher_CW = logits(), logits()
    bars_CV = torch.rand(ROWS - 40, request.param, generator=generator, device="cuda") < 0.5
    for logits_CW in (student_CW, teacher_CW):
        logits_CW[40:, MARGIN:-MARGIN].masked_fill_(bars_CV, -torch.inf)
    labels_C = torch.randint(-3, request.param + 3, (ROWS,), generator=generator, device="cuda")
    return make_tiles(student_CW, teacher_CW, labels_C)


@pytest.mark.parametrize("weighted_log_ratio", [None, *WeightedLogRatio])
def test_measure(kernels: ModuleType, tiles: Tiles, weighted_log_ratio: WeightedLogRatio | None) -> None:
    check_measure(kernels, tiles, weighted_log_ratio)


def test_mixture(kernels: ModuleType, tiles: Tiles) -> None:
    check_mixture(kernels, tiles)


@pytest.mark.parametrize("out", [None, torch.bfloat16], ids=["in place", "bfloat16"])
@pytest.mark.parametrize("name", PARTS)
def test_gradient(kernels: ModuleType, tiles: Tiles, name: str, out: torch.dtype | None) -> None:
    check_gradient(kernels, tiles, PARTS[name], out)


def test_float64(kernels: ModuleType, tiles: Tiles) -> None:
    few = slice(36, 44)
    wide = make_tiles(tiles.student_CW[few].double(), tiles.teacher_CW[few].double(), tiles.labels_C[few])
    check_measure(kernels, wide, WeightedLogRatio.STUDENT)
    check_mixture(kernels, wide)
    check_gradient(kernels, wide, PARTS["reverse KL"])
    check_gradient(kernels, wide, PARTS["mixture"])


def test_rows_more_than_2_to_the_31_numbers_apart(kernels: ModuleType) -> None:
    if torch.cuda.mem_get_info()[0] < LARGE * 2**30:
        pytest.skip(f"needs {LARGE} GiB of free GPU memory")
    stride, columns = 2**30 + 2**10, 5000  # the third row's offset is beyond int32, the stride itself is not
    far_CV = torch.empty(2 * stride + columns, device="cuda").as_strided((3, columns), (stride, 1))
    near_CV = 3 * torch.randn(3, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    far_CV.copy_(near_CV)
    near = make_tiles(*(torch.nn.functional.pad(near_CV, (MARGIN, MARGIN)) for _ in range(2)), torch.arange(3).cuda())
    # Triton adds up a row in an order that depends on the stride's alignment. A wrong offset reads other random logits:
    # its maxima and gradients would be off by tenths.
    close = {"rtol": 1e-5, "atol": 1e-6}
    far_KC, near_KC = (
        kernels.measure(logits_CV, logits_CV, near.labels_C, WeightedLogRatio.STUDENT, masked=True)
        for logits_CV in (far_CV, near_CV)
    )
    assert torch.equal(far_KC[[0, 3, 4, 7]], near_KC[[0, 3, 4, 7]])  # maxima and labels' logits are not sums
    torch.testing.assert_close(far_KC, near_KC, **close)
    assert torch.equal(far_KC[0], tile.measure(near_CV, None, near.labels_C, WeightedLogRatio.NONE, masked=True)[0])
    gradients = [
        kernels.gradient_(logits_CV, logits_CV.clone(), near.labels_C, near.row, masked=True)
        for logits_CV in (far_CV, near_CV)
    ]
    torch.testing.assert_close(*gradients, **close)
