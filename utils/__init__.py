"""Feature bank, scoring, metrics, run folder, tables and pictures; nothing here knows a model."""
