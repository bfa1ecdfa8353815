"""Lets the package index's torchvision be imported with a CPU build of torch. Imported at each interpreter start.

SGLang imports torchvision for image models. Its compiled part does not load with another build of torch than its own,
and then the operators that its Python part refers to by name are missing. They are declared here, without an
implementation, when torchvision is first imported; calling one fails.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = (
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing. Sees that torchvision is about to be imported, and goes away."""

    def find_spec(self, name: str, *_rest: Any) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator, schema in OPERATORS:
                torch.library.define(operator, schema)


sys.meta_path.insert(0, _BeforeTorchvision())
