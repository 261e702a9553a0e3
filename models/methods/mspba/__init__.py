"""MSPBA: embeddings of patches of three sizes, trained on where patches lie to each other."""
