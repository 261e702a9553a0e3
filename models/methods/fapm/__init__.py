"""FAPM: memories of normal features for each region of the image and each stage."""
