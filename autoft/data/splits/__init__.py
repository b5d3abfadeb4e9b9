"""Which image is trained on, which selects, and which stays locked."""
