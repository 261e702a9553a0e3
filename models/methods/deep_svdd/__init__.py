"""Deep SVDD and the LeNets it trains."""
