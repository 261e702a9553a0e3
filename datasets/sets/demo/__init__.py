"""The embedded demo data set: crops of three textures, and the defects drawn on them."""
