"""The cache: what can be made again, written whole, kept within a limit."""
