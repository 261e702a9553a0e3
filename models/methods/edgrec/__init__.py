"""EdgRec: rebuilds the colours of an image from its grey edges."""
