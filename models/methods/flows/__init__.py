"""Normalising flows: DifferNet and Glow, and the invertible layers that they share."""
