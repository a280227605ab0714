"""From text to batches: tokenizer, document sources, their order, rows, and the loader."""
