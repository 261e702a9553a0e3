"""The run folder and everything written into it; nothing here computes a score."""
