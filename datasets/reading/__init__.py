"""Files into arrays: images, masks, folder layouts, transforms, batches; no data set by name."""
