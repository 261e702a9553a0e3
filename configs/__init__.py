"""Experiments as frozen dataclasses; beside each number, where it comes from."""
