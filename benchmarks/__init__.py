"""Measurements side by side with what else a user would take; run by hand (README.md)."""
