"""Changes of a model's weights that leave its function as it is.

Every transform is a file of its own behind the table ``TRANSFORMS``; which parts of a decoder they touch, and which
models they refuse, is in ``decoder_blocks``.
"""

from runtime.transforms.rescaling import apply_random_rescaling_
from runtime.transforms.tied_head import has_map, install_map_
from runtime.transforms.transform_table import (
    TRANSFORMS,
    NamedTransform,
    Transform,
    apply_transforms_,
    fingerprint_transforms,
    parse_transform,
)

__all__ = [
    "TRANSFORMS",
    "NamedTransform",
    "Transform",
    "apply_random_rescaling_",
    "apply_transforms_",
    "fingerprint_transforms",
    "has_map",
    "install_map_",
    "parse_transform",
]
