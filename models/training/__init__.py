"""What methods that train share: epochs, initial weights, mixed precision, augmentations."""
