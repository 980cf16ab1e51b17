"""Products with packed weights: one reference that defines correct, and kernels for the device at hand."""
