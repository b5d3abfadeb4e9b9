"""Built-in strategies: pure arithmetic, reached by entry point, never imported by name."""
