"""One trial from top to bottom, and the features that trials share."""
