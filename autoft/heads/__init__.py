"""Built-in heads, reached by entry point, never imported by name."""
