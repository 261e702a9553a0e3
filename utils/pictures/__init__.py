"""Pictures of what a detector found: sheets of anomaly maps, galleries, histograms."""
