"""Storage with a commit protocol, what is saved, retention."""
