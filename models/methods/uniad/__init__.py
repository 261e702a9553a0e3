"""UniAD: the transformer that rebuilds tokens from all but their neighbours, and the detector."""
