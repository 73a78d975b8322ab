"""DeepSpeed: its settings, its engine, and its extensions."""
