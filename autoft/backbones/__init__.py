"""Built-in backbones, reached by entry point, never imported by name."""
