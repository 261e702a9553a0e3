"""From a data set to one-class tasks: what is normal, what anomalous, which images are which."""
