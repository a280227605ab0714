"""The Trainer, the assembly of its configuration, and the entry point `python -m trainer`."""
