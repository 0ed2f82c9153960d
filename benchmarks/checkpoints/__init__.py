"""Checkpoints: how long it takes to save and to load them, and what it costs meanwhile."""
