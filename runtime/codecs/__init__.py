"""Codecs: for each kind of format, from a weight to the tensors it is stored as, and back.

The tensors of a kind are laid out in ``runtime/storage.py``; a codec fills and reads them. Integer formats are filled
by the quantizers as well; every other kind is rendered by its own encoder, whatever quantizer is asked for.
"""

from runtime.codecs.binary import BINARY
from runtime.codecs.chosen_type import CHOSEN_TYPE
from runtime.codecs.codec import Codec, StoredTensors
from runtime.codecs.column_mixture import COLUMN_MIXTURE
from runtime.codecs.double_rounding import DOUBLE_ROUNDING
from runtime.codecs.ggml import GGML
from runtime.codecs.group_mixture import GROUP_MIXTURE
from runtime.codecs.integer import INTEGER
from runtime.codecs.nested import NESTED
from runtime.codecs.planes import PLANES
from runtime.codecs.residual_blocks import RESIDUAL_BLOCKS
from runtime.codecs.scaled_elements import SCALED_ELEMENTS
from runtime.codecs.searched_float import SEARCHED_FLOAT
from runtime.codecs.ternary import TERNARY
from runtime.codecs.unquantized import UNQUANTIZED

CODECS: dict[str, Codec] = {
    "float": UNQUANTIZED,
    "int": INTEGER,
    "binary": BINARY,
    "element": SCALED_ELEMENTS,
    "searched_float": SEARCHED_FLOAT,
    "ggml": GGML,
    "ternary": TERNARY,
    "chosen_type": CHOSEN_TYPE,
    "planes": PLANES,
    "nested": NESTED,
    "double_rounding": DOUBLE_ROUNDING,
    "residual_blocks": RESIDUAL_BLOCKS,
    "column_mixture": COLUMN_MIXTURE,
    "group_mixture": GROUP_MIXTURE,
}

__all__ = ["CODECS", "Codec", "StoredTensors"]
