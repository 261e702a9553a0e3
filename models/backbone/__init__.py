"""The frozen timm network: its weights, its features, and how it is rewritten to run faster."""
