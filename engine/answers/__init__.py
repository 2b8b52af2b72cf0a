"""Text that a patched model says: its tokens, how they are chosen, how good they are."""
