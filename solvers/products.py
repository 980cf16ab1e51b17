"""Products of arrays that come out the same on any number of threads.

BLAS splits large products among its threads, and rounds differently where it splits; of two moves that are equal but
for rounding, the other one then wins. `np.einsum` without `optimize` sums on one thread in one order. Everything that
a comparison depends on is multiplied here.

Complexity: about twice the time of BLAS on one thread for matrix times vector, six times for matrix times matrix.
"""

import numpy as np

from solvers.problem import FloatArray, IntArray


def contract(subscripts: str, first: FloatArray, second: FloatArray) -> FloatArray:
    """Returns the sum over the repeated indices, as `np.einsum` writes them."""
    return np.asarray(np.einsum(subscripts, first, second))


def dot(first: FloatArray, second: FloatArray) -> float:
    """Returns the inner product of two vectors."""
    return float(np.einsum("i,i->", first, second))


def sum_chosen(table: FloatArray, choice: IntArray) -> float:
    """Returns the sum over units of the entries of a table [U, F] that a choice [U] takes."""
    return float(table[np.arange(choice.size), choice].sum())


def price_candidates(price: FloatArray, cost: FloatArray) -> FloatArray:
    """Returns price . cost of every candidate, [U, F], for price [R] and cost [R, U, F]."""
    return contract("r,ruf->uf", price, cost)
