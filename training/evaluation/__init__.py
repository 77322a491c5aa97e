"""The paper's tables, one file each: what `python -m training.evaluate` runs."""
