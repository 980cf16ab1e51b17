"""Orthogonal matrices: Hadamard where one can be built, random otherwise.

A Hadamard matrix of order n has entries +-1 and H H' = n I. Sylvester's construction doubles an order; Paley's gives
the order q + 1 for a prime q = 3 (mod 4) and 2 (q + 1) for a prime q = 1 (mod 4), out of the quadratic residues modulo
q. A size that is no power of two is 2^i times the largest of Paley's orders that leaves a power of two: 576 = 8 * 72
with q = 71, 1536 = 4 * 384 with q = 383. Where there is none (172 = 4 * 43, say) the odd part m is a random orthogonal
matrix, multiplied by Sylvester's of the rest in the Kronecker sense: entries are then no longer all of one magnitude,
and a channel spreads evenly over copies of a random spread.

Complexity: n^2 for a Hadamard matrix, n^3 for a random one.

Papers: Paley 1933, "On orthogonal matrices"; use for rotations of language models: Ashkboos et al. 2024 (QuaRot,
arXiv:2404.00456).
"""

import math

import torch
from torch import Tensor


def make_hadamard(size: int) -> Tensor | None:
    """Returns a Hadamard matrix [size, size] float64 of entries +-1, or None where neither construction gives one."""
    if not size & (size - 1):
        return _make_sylvester(size.bit_length() - 1)
    core, doublings = _make_paley(size), 0
    while core is None and size % 2 == 0:
        size, doublings = size // 2, doublings + 1
        core = _make_paley(size)
    return None if core is None else torch.kron(_make_sylvester(doublings), core)


def make_random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Returns a uniformly distributed orthogonal matrix [size, size] float64."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    signed: Tensor = orthogonal * triangular.diagonal().sign()
    return signed.contiguous()


def make_hadamard_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Returns an orthogonal matrix [size, size] float64: random signs, then Hadamard.

    Args:
        size: Any positive number; see above for sizes of no known Hadamard matrix.
        generator: Draws the signs, and the odd part where it must be random.
    """
    signs = 1 - 2 * torch.randint(0, 2, (size, 1), generator=generator).double()
    hadamard = make_hadamard(size)
    if hadamard is not None:
        return signs * hadamard / math.sqrt(size)
    odd = size // (size & -size)
    even = _make_sylvester((size // odd).bit_length() - 1) / math.sqrt(size // odd)
    return signs * torch.kron(even, make_random_orthogonal(odd, generator))


def _make_sylvester(doublings: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


def _make_paley(size: int) -> Tensor | None:
    """Returns Paley's matrix of an order, or None."""
    if size % 4:
        return None
    if _is_prime(size - 1):
        core = _make_conference(size - 1)  # skew, as size - 1 = 3 (mod 4)
        return core + torch.eye(size, dtype=torch.float64)
    prime = size // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        core = _make_conference(prime)  # symmetric
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, one) + torch.kron(torch.eye(size // 2, dtype=torch.float64), diagonal)
    return None


def _make_conference(prime: int) -> Tensor:
    """Returns C [q + 1, q + 1] with zeros on the diagonal, +-1 elsewhere and C C' = q I."""
    residue = torch.full((prime,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, prime).pow(2) % prime] = 1.0
    residue[0] = 0.0
    index = torch.arange(prime)
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    conference[1:, 1:] = residue[(index[:, None] - index[None, :]) % prime]
    conference[0, 1:] = 1.0
    conference[1:, 0] = 1.0 if prime % 4 == 1 else -1.0
    return conference


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
