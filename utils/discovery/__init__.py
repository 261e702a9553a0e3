"""From anomaly maps to kinds of defects: masks, regions, and how well kinds agree with names."""
