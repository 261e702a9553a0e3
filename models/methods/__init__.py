"""A file for each method: its options, its detector and its METHOD; a folder for a family."""
