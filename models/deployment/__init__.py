"""A finished detector as one graph, and the formats it is written in; no run folder."""
