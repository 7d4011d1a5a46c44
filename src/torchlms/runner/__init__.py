"""An unmodified training script, run as if alone, within a budget."""
