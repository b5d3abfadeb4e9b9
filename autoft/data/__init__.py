"""Images on disk: which there are, how they are decoded, split, stored and batched."""
