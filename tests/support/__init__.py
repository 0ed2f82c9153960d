"""What several test modules build on; found through pytest's pythonpath."""
