"""The steps of discover.py in their order: looking, cutting, collecting, finding, writing.

What a step computes is in `utils.discovery` and `models.discovery`; here it meets files and runs.
"""
