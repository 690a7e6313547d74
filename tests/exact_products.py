"""Matrix products in Triton's interpreter that do not depend on the memory addresses of their operands.

The interpreter computes them with numpy, whose BLAS sums in an order that depends on the alignment of the operands: on
some processors, the same float32 product computed twice differs in the last bit. Computed in float64 and then rounded,
it does not. Test files that compare results bit for bit import the fixture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    product = np.matmul

    def rounded(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        return product(a.astype(np.float64), b.astype(np.float64)).astype(dtype or np.result_type(a, b))

    monkeypatch.setattr(np, "matmul", rounded)
