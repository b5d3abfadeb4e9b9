"""Honest numbers: what regime the data is in, which trial wins, and how sure the score is."""
