"""One torch-free dataclass per TOML section, and the machinery that fills them."""
