"""Tasks: input/output pairs, their split by seed, and the prompts made of them."""

from engine.tasks.pairs import SHIPPED, Pair, Split, Task, load
from engine.tasks.scoring import Example, first_token, first_token_hits, first_token_losses

__all__ = [
    "SHIPPED",
    "Example",
    "Pair",
    "Split",
    "Task",
    "first_token",
    "first_token_hits",
    "first_token_losses",
    "load",
]
