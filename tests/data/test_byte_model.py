import math

import pytest

from tests.data.byte_model import measure_bits_per_byte, measure_entropy_bits


def test_entropy_of_known_texts() -> None:
    assert measure_entropy_bits("abab" * 16, history=0) == pytest.approx(1.0)
    # Given the byte before, only the first byte is open, and it has a history of its own.
    assert measure_entropy_bits("abab" * 16, history=1) == 0.0
    # After "a" one of two, after "b" always "a": half of the bytes cost one bit.
    assert measure_entropy_bits("aab" * 1000, history=1) == pytest.approx(2 / 3, abs=2e-3)


def test_bytes_without_training_cost_eight_bits() -> None:
    # Of the history "x" nothing is known, so each order hands down what the one below says: for "y", which was
    # never seen, a share of T / (c + T) = 1 / 2 of the uniform distribution.
    assert measure_bits_per_byte(["x"], ["y"], history=0) == pytest.approx(-math.log2(1 / 2 / 256))


def test_interpolation_after_witten_and_bell() -> None:
    # Order 0 of "aab": c = 3, T = 2; p(a) = (2 + 2/256) / 5. Order 1 after "a": c = 2, T = 2, c(ab) = 1, and after
    # the start: c = 1, T = 1, c(a) = 1.
    a, b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    first, second = (1 + a) / 2, (1 + 2 * b) / 4
    expected = -(math.log2(first) + math.log2(second)) / 2
    assert measure_bits_per_byte(["aab"], ["ab"], history=1) == pytest.approx(expected)


def test_longer_histories_help_where_text_repeats() -> None:
    training, evaluation = ["the cat sat on the mat. " * 20], ["the cat sat on the mat. "]
    by_history = [measure_bits_per_byte(training, evaluation, history=n) for n in range(4)]
    assert by_history == sorted(by_history, reverse=True)
