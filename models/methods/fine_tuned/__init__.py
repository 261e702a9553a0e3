"""Methods that fine-tune the backbone itself, what they share, and the Fisher information."""
