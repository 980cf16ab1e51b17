"""Input statistics: the damped Hessian, the output error of inputs that are known, and what is refused."""

import pytest
import torch

from runtime.quantizers import InputStatistics
from tests.runtime.quantizers.cases import draw_weight


def make(inputs: torch.Tensor, damping: float = 0.1) -> InputStatistics:
    return InputStatistics(second_moment=inputs.T @ inputs, count=len(inputs), damping=damping)


def test_output_error_is_the_mean_squared_output() -> None:
    x, difference = draw_weight(50, 7), draw_weight(4, 7, seed=1)
    expected = (x.double() @ difference.double().T).square().sum() / 50
    assert make(x).output_error(difference) == pytest.approx(float(expected), rel=1e-5)


def test_hessian_is_the_mean_with_a_part_of_its_diagonal() -> None:
    x = draw_weight(50, 7)
    expected = x.double().T @ x.double() / 50
    expected += 0.25 * expected.diagonal().mean() * torch.eye(7)
    # 50 products are summed, each rounded by 2^-24 of itself; entries are of the order of one.
    torch.testing.assert_close(make(x, 0.25).hessian().double(), expected, rtol=0, atol=50 * 2.0**-24)


def test_dead_channels_get_the_mean_of_the_diagonal() -> None:
    x = draw_weight(50, 4)
    x[:, 2] = 0.0
    H = make(x, 0.0).hessian()
    assert float(H[2, 2]) == pytest.approx(float(make(x, 0.0).second_moment.diagonal().mean() / 50))
    assert not bool(H[2, [0, 1, 3]].any())


def test_inputs_never_seen_are_isotropic() -> None:
    never = InputStatistics(second_moment=torch.zeros(5, 5), count=3.0)
    assert torch.equal(never.hessian(), torch.eye(5))
    assert torch.equal(InputStatistics.isotropic(5).hessian(), torch.eye(5))
    assert InputStatistics.isotropic(5).in_features == 5


def test_hessian_is_a_new_tensor() -> None:
    statistics = InputStatistics.isotropic(3)
    statistics.hessian().zero_()
    assert torch.equal(statistics.second_moment, torch.eye(3))


def test_root_mean_square_bounds_the_mean_magnitude() -> None:
    x = draw_weight(50, 7)
    statistics = make(x)
    torch.testing.assert_close(statistics.root_mean_square(), x.square().mean(0).sqrt())
    assert bool((statistics.root_mean_square() >= x.abs().mean(0)).all())


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    x, scale = draw_weight(50, 7), draw_weight(1, 7, seed=2)[0].exp()
    divided = make(x).divided(scale)
    torch.testing.assert_close(divided.second_moment, make(x / scale).second_moment, rtol=1e-4, atol=1e-4)
    assert (divided.count, divided.damping) == (50, 0.1)


@pytest.mark.parametrize(
    ("moment", "numbers", "message"),
    [
        (torch.zeros(2, 3), {}, r"second_moment must be \[in_features, in_features\]: got shape \[2, 3\]"),
        (torch.zeros(4), {}, r"got shape \[4\]"),
        (torch.full((2, 2), float("nan")), {}, "second_moment must be finite .*diagonal from nan"),
        (torch.diag(torch.tensor([1.0, -2.0])), {}, "no diagonal entry below zero: got a diagonal from -2 to 1"),
        (torch.eye(2), {"count": 0.0}, "count must be a positive number: got count=0.0"),
        (torch.eye(2), {"count": float("nan")}, "count must be a positive number: got count=nan"),
        (torch.eye(2), {"damping": -0.1}, "damping must be a finite number >= 0: got damping=-0.1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_statistics_are_refused(moment: torch.Tensor, numbers: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputStatistics(**{"second_moment": moment, "count": 1.0, **numbers})  # type: ignore[arg-type]
