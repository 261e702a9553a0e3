"""CutPaste: its views of images, the network that tells them apart, and the density behind it."""
