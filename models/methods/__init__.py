"""A file for each method, with its options, its detector and its METHOD; families in a folder each."""
