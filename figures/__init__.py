"""Figures and tables of the papers, made from run folders alone."""
