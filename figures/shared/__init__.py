"""What the figures share: reading and pooling runs, drawing, tables of a paper's form."""
