"""Where checkpoints live: files, their commit order, the pointer, the ledger. No collectives, no torch."""
