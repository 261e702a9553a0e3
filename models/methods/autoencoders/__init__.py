"""Autoencoders that rebuild images through a code of one position: plain and variational."""
