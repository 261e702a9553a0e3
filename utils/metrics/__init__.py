"""Exact metrics of anomaly scores, all from one sort; nothing here knows images or files."""
