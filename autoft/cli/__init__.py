"""Flags into calls, results into text; one file a command, nothing heavy imported at start."""
