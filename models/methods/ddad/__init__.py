"""DDAD: a diffusion model that rebuilds an image without its defects, and what differs then."""
