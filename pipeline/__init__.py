"""Joins the packages: an experiment from command line to table, and a finished run."""
