"""What is in a checkpoint: portable state of models, optimizers and generators. Knows torch, no files."""
