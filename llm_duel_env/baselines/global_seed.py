"""Libraries that draw from the global generators, made reproducible: seeded around a call, and put back after it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from llm_duel_env.randomness import generator


@contextlib.contextmanager
def global_seed(seed: int, *key: int | str, devices: Sequence[torch.device] = ()) -> Iterator[int]:
    """Within it the global generators of NumPy and torch are seeded by (seed, key); on leaving they, and Python's, are
    as they were.

    Args:
        seed: of the run.
        key: names the stream, as in `randomness.generator`.
        devices: GPUs whose generators are put back too; those of the CPU always are.

    Yields:
        The number that they were seeded with, for generators that the library keeps elsewhere.
    """
    before = random.getstate(), np.random.get_state()
    number = int(generator(seed, *key).integers(2**31))
    with torch.random.fork_rng(devices=list(devices)):
        np.random.seed(number)
        torch.manual_seed(number)
        try:
            yield number
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
