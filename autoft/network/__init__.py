"""Backbone and head as one network: its stages, their rates and modes, and its weights."""
