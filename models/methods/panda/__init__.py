"""PANDA by early stopping and by elastic weights, and the Fisher information of the latter."""
