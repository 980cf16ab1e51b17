"""The integer codec packs what the quantizers choose, and reads any rows back."""

import pytest
import torch

from runtime.codecs.integer import decode_integer, encode_integer, integer_codes, pack_quantized
from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import quantize
from tests.runtime.quantizers.cases import draw_statistics, draw_weight

SHAPE = (5, 192)


@pytest.mark.parametrize("name", ["int2_g64", "int3_g32_sym", "int5_channel", "int8_g64"])
def test_packed_is_what_was_quantized(name: str) -> None:
    weight, format_ = draw_weight(*SHAPE), FORMATS[name]
    quantized = quantize(weight, format_, "hqq")
    tensors, rows = pack_quantized(quantized), torch.tensor([4, 0, 4])
    assert torch.equal(decode_integer(tensors, format_, SHAPE), dequantize(quantized))
    assert torch.equal(decode_integer(tensors, format_, SHAPE, rows), dequantize(quantized)[rows])
    assert torch.equal(integer_codes(tensors, format_, SHAPE, rows), quantized.codes[rows])


def test_encoder_rounds_to_nearest_and_clips_by_importance() -> None:
    weight, format_, statistics = draw_weight(*SHAPE), FORMATS["int3_g64"], draw_statistics(192)
    nearest = decode_integer(encode_integer(weight, format_), format_, SHAPE)
    assert torch.equal(nearest, dequantize(quantize(weight, format_, "rtn")))
    clipped = decode_integer(encode_integer(weight, format_, statistics.hessian().diagonal()), format_, SHAPE)
    assert torch.equal(clipped, dequantize(quantize(weight, format_, "clipping", statistics=statistics)))
