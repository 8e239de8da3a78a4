"""The library's search for the worst pattern of participations, on a dense Gram matrix C'C."""

import math

import numpy as np

from keras_bandmf.strategies import participation, sensitivity


def gram_products(gram):
    """The diagonals of a dense symmetric `(n, n)` matrix, as `participation` takes them."""
    found = {0: np.abs(np.diagonal(gram))}
    for m in range(1, len(gram)):
        if np.any(diagonal := np.abs(np.diagonal(gram, m))):
            found[m] = np.append(diagonal, np.zeros(m))
    return found


def gram_bound(gram, max_participations, min_separation, fixed_order=False):
    """At least the sensitivity of any C with `C'C = gram`, (n, n); exact where it is searched."""
    fits = participation.participations(len(gram), max_participations, min_separation)
    products = gram_products(gram)
    if fixed_order:
        return math.sqrt(participation.fixed_order_maximum(products, fits, min_separation))
    return math.sqrt(sensitivity._separated(products, fits, min_separation))
