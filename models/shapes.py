"""Shape annotations, `Float[Tensor, "rows vocab"]`, checked at run time in the tests only.

jaxtyping is not needed to run: every module reads annotations lazily, so without it the names may be anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:
        Bool = Float = Int = Any

Integer: TypeAlias = SupportsIndex  # of Python, numpy or torch; `models.reading` refuses bools

__all__ = ["Bool", "Float", "Int", "Integer"]
