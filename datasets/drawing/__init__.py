"""What is drawn into normal images to make anomalies of them; nothing here needs torch."""
