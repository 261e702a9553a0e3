"""Tables of results and of published numbers, and the formats they are printed in."""
