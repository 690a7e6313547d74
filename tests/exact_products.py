"""Products in Triton's interpreter that do not depend on the addresses of their factors.

The interpreter makes them with numpy, whose BLAS adds up in an order that depends on the alignment of the factors: on
some processors the same product of float32, made twice, differs in the last bit. In float64, and rounded afterwards, it
does not. Test files that compare bits import the fixture.
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
