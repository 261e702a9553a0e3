"""Joins the packages: an experiment's command line, data, backbone, features, training, finished run."""
