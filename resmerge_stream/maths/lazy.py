"""The one lazy door to torch, numpy and the maths: each is imported when it is first used.

Planning names every method and every source, and starts in half a second; torch alone takes longer.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "TaskVectors", "Tensor", "block_krylov", "chance", "dequantise", "factors", "kernels", "krylov",
    "low_rank", "np", "passes", "products", "rounding", "spectral", "torch",
]  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from . import (
        block_krylov,
        chance,
        dequantise,
        factors,
        kernels,
        krylov,
        low_rank,
        passes,
        products,
        rounding,
        spectral,
    )  # fmt: skip
    from .task_vectors import TaskVectors
else:

    class _Lazy:
        """Stands for a module until something of it is asked for, and is it from then on."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, name: str) -> Any:
            module = importlib.import_module(self.__name__)
            self.__dict__ = module.__dict__
            return getattr(module, name)

    np, torch = _Lazy("numpy"), _Lazy("torch")
    (block_krylov, chance, dequantise, factors, kernels, krylov, low_rank, passes, products,
     rounding, spectral) = (
        _Lazy(f"{__package__}.{name}") for name in (
            "block_krylov", "chance", "dequantise", "factors", "kernels", "krylov", "low_rank",
            "passes", "products", "rounding", "spectral",
        )
    )  # fmt: skip
    # For annotations, which nothing evaluates.
    Tensor = TaskVectors = object()
