"""From files to rows: sources, tokenizing, packing, row sources, loaders."""
