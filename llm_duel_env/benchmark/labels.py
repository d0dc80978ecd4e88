"""What became of the labels that a run bought: ties and noise, which only an evaluator may know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

EVEN = 2.5e-7
"""A probability this close to 1/2 belongs to utilities closer than 1e-6 (one logit is a quarter near 1/2): a tie."""
KINDS = ("even", "tied", "flipped", "identical")


def label_counts(info: Mapping[str, Any]) -> dict[str, int]:
    """How many of a step's duels were of each of `KINDS`.

    even: bought, and the oracle finds both responses equally good, whatever the label says. tied: bought, and labelled
    a tie. flipped: bought, and the label says the contrary of what the oracle finds more probable (Bernoulli feedback
    and flips do that). identical: a response shown against itself, which is neither asked nor charged.

    Args:
        info: of a step of the vector environment; arrays (M,).

    >>> probability = [0.9, 0.5, 0.5, 0.5]
    >>> label_counts({"charged": [1, 1, 1, 0], "preference": [0, 1, 0.5, 0.5], "metrics/probability": probability})
    {'even': 2, 'tied': 1, 'flipped': 1, 'identical': 1}
    """
    charged, preference = np.asarray(info["charged"], bool), np.asarray(info["preference"], np.float64)
    gap = np.asarray(info["metrics/probability"], np.float64) - 0.5
    even, tied = np.abs(gap) <= EVEN, preference == 0.5
    contrary = (preference - 0.5) * gap < 0
    found = (charged & even, charged & tied, charged & ~even & contrary, ~charged & tied)
    return {name: int(rows.sum()) for name, rows in zip(KINDS, found, strict=True)}
