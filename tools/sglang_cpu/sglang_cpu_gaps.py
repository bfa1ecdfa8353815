"""Make PyPI's torchvision importable with a CPU build of torch. Imported at each interpreter start.

SGLang imports torchvision for image models. Its compiled extension does not load with a different build of torch, and
operators that its Python code refers to are then missing. They are declared here without an implementation when
torchvision is first imported; calling one fails.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = (
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


class _BeforeTorchvision(MetaPathFinder):
    """Declares the operators before the first import of torchvision; finds no modules."""

    def find_spec(self, name: str, *_rest: Any) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator, schema in OPERATORS:
                torch.library.define(operator, schema)


sys.meta_path.insert(0, _BeforeTorchvision())
