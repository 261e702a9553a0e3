"""MemSeg: segments drawn anomalies by how features differ from those of remembered images."""
