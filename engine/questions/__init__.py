"""What does each unit do? Patched one by one, or estimated from gradients; with statistics."""
