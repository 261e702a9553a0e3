"""RIAD: reconstruction by inpainting."""
