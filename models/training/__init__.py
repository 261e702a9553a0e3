"""What methods that train share: epochs, hold-outs, initial weights, augmentations, precision."""
