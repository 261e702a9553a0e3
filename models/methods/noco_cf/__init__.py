"""NoCo in closed form: the solution (noco_cf) and features among several centres (centres)."""
