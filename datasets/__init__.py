"""Readers of the data sets, transforms of image and mask as a pair, and defects drawn on images."""
