"""An n-gram model of bytes, the yardstick for the small mixture of experts.

Interpolated after Witten and Bell (1991, IEEE Trans. Inf. Theory 37(4), method C): with c(h w) the count of byte w
after history h, T(h) the number of distinct bytes after h, and h' the history without its oldest byte,

    p(w | h) = ( c(h w) + T(h) p(w | h') ) / ( c(h) + T(h) )

down to the uniform distribution over 256 bytes. Time and memory grow as the number of bytes times the order.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def measure_bits_per_byte(training: Sequence[str], evaluation: Sequence[str], *, history: int = 3) -> float:
    """Returns the mean code length in bits of a byte of `evaluation`, its model counted on `training`.

    Args:
        training: Documents to count on.
        evaluation: Documents to encode.
        history: Number of preceding bytes that a byte is predicted from, at most 6.
    """
    known, text = _join(training), _join(evaluation)
    probability = np.full(len(text), 1 / 256)
    for length in range(history + 1):
        grams, histories = _grams(known, length), _grams(text, length) >> 8
        distinct, counts = np.unique(grams, return_counts=True)
        # Of one history after another: how often it was seen, and followed by how many distinct bytes.
        seen, first, followers = np.unique(distinct >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        of_gram = _look_up(distinct, counts, _grams(text, length))
        of_history, diversity = _look_up(seen, totals, histories), _look_up(seen, followers, histories)
        denominator = of_history + diversity
        mixed = (of_gram + diversity * probability) / np.maximum(denominator, 1)
        probability = np.where(denominator > 0, mixed, probability)
    return float(-np.log2(probability).mean())


def measure_entropy_bits(text: str, *, history: int) -> float:
    """Returns the empirical entropy in bits of a byte of `text` given the `history` bytes before it.

    No model that looks at these bytes alone, wherever its probabilities come from, encodes this text shorter.
    """
    data = _join([text])
    counts = np.unique(_grams(data, history), return_counts=True)[1]
    of_histories = np.unique(_grams(data, history) >> 8, return_counts=True)[1]
    return float((of_histories * np.log2(of_histories)).sum() - (counts * np.log2(counts)).sum()) / len(data)


def _join(documents: Sequence[str]) -> NDArray[np.int64]:
    return np.frombuffer("\0".join(documents).encode(), dtype=np.uint8).astype(np.int64)


def _grams(data: NDArray[np.int64], history: int) -> NDArray[np.int64]:
    """Returns each byte with the `history` bytes before it as one number; zeros stand before the first."""
    padded = np.concatenate([np.zeros(history, dtype=np.int64), data])
    grams = np.zeros(len(data), dtype=np.int64)
    for i in range(history + 1):
        grams = grams << 8 | padded[i : i + len(data)]
    return grams


def _look_up(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the value of each wanted key, 0 where there is none; `keys` are sorted."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
