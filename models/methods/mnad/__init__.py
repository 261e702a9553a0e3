"""MNAD: an autoencoder with a memory of normal patterns."""
