"""Scores of images, metrics of a test set, what is chosen by them, and thresholds from normals."""
