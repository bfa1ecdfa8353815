"""Find operators for whose result the host would wait, were the tensors on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"),
    *("aten::unique_dim", "aten::_unique2", "aten::is_nonzero", "aten::item"),
}
"""Operators whose result the host needs: it would wait for the device."""


class Waits(TorchDispatchMode):
    """Names of such operators, in `found`. A mask as an index is one: the host allocates what it selects."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = [value for value in tree_leaves(args) if isinstance(value, Tensor) and value.dtype == torch.bool]
        if name in WAITS or (name in ("aten::index", "aten::index_put_") and masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
