"""AnomalyNCD: kinds of defects without names, learnt beside other defects that have names."""
