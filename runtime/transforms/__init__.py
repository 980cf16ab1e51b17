"""Changes of a model's weights that leave its function as it is."""

from runtime.transforms.rescaling import apply_random_rescaling_

__all__ = ["apply_random_rescaling_"]
