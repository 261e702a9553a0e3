"""Frozen backbones, and the methods on their features; nothing here knows data sets or runs."""
