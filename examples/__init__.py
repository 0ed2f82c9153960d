"""Training scripts that conf/ points to."""
