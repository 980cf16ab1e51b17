"""Allocation rules that people know, for comparison: one file each, every answer with a bound that is not its own."""
