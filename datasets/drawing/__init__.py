"""What is drawn into normal images to make anomalies of them: NumPy and OpenCV alone."""
