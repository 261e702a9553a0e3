"""A file for each data set: where it lies, its categories, its preset; found by the file's name."""
