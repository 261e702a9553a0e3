"""Frozen backbones and the methods that stand on their features; nothing here knows data sets or runs."""
