"""Which trial next, at which rung, and where it runs."""
