"""Features of sets of images: stored on a device, in memory or on disk, or streamed."""
