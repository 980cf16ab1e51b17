"""References against what they must be: the dense product of what integers stand for, and torch's attention."""

import torch

from runtime.activation_formats import ACTIVATION_FORMATS, ActivationRounding
from runtime.kernels.reference import attention_reference, integer_linear_reference


def test_integer_products_are_those_of_what_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, out_features, groups, length in [(1, 1, 1, 1), (3, 5, 2, 32), (2, 7, 1, 97), (0, 4, 3, 16)]:
        integers = torch.randint(-128, 128, (rows, groups * length), generator=generator)
        codes = torch.randint(0, 256, (out_features, groups * length), generator=generator)
        zero = torch.randint(0, 256, (out_features, groups), generator=generator)
        # Powers of two: the dense product is exact in float64 as well.
        x_scale = torch.ldexp(torch.ones(rows), torch.randint(-9, 9, (rows,), generator=generator))
        scale = torch.ldexp(torch.ones(out_features, groups), torch.randint(-9, 9, (out_features, groups)))
        each = scale.double().repeat_interleave(length, dim=1)
        weight = each * (codes - zero.repeat_interleave(length, dim=1)).double()
        expected = (x_scale.double()[:, None] * integers.double()) @ weight.t()
        assert torch.equal(integer_linear_reference(integers, x_scale, codes, scale, zero), expected)


def test_row_scales_are_those_that_rendering_uses() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for name, scale in (("int8_tensor", None), ("int4_tensor", None), ("int8_tensor_static", torch.tensor([0.03]))):
        rounding = ActivationRounding(format=ACTIVATION_FORMATS[name], scale=scale)
        found = rounding.list_row_scales(x)
        assert found is not None and found.shape == (6,)
        steps = rounding.render(x).view(6, 32).double() / found.double()[:, None]
        # Whole numbers, but for the rounding of two float32 operations.
        assert float((steps - steps.round()).abs().max()) <= 128 * 2.0**-22
    assert ActivationRounding(format=ACTIVATION_FORMATS["int8_token"]).list_row_scales(x) is None


def test_attention_is_torch_s_own() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 3, 16, dtype=torch.float64, generator=generator)
    key = torch.randn(2, 2, 11, 16, dtype=torch.float64, generator=generator)
    value = torch.randn(2, 2, 11, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 1, 3, 11, generator=generator) < 0.7
    mask[..., 0] = True
    for seen in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(attention_reference(query, key, value, seen, 0.3), expected)
