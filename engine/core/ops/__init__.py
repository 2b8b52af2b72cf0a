"""What is computed in several ways behind one name."""

from engine.core.ops.edit import Impl, edit_heads

__all__ = ["Impl", "edit_heads"]
