"""The decoding methods, one per file: its formula, its source, and its published settings as defaults."""
