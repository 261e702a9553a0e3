"""Scores of test images, what is chosen by them, and thresholds; no files, no metrics of its own."""
