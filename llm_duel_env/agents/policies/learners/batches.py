"""Which rows of an optimizer step go into which forward pass, on which rank."""

from __future__ import annotations

import numpy as np


def microbatches(
    batch: np.ndarray, sizes: np.ndarray | None, microbatch: int, rank: int = 0, world: int = 1
) -> list[tuple[np.ndarray, float]]:
    """A rank's forward passes for one optimizer step.

    Rows of like size come together, so that little of a pass is padding; each of `world` ranks takes every `world`-th
    row of each such group. All ranks make the same number of passes, as they meet in each: one that has run out of rows
    goes through one row again with weight 0.

    Args:
        batch: (B,) row numbers, B >= 1.
        sizes: (B,) tokens of each row of the batch; None leaves the rows in order.
        microbatch: rows of a pass, at most.
        rank: of this process.
        world: ranks.

    Returns:
        Pairs of rows and their weight. The sum over all ranks of weight times the mean over the rows is the mean over
        the batch.

    >>> microbatches(np.array([4, 2, 7]), np.array([9, 3, 5]), microbatch=2)
    [(array([2, 7]), 0.6666666666666666), (array([4]), 0.3333333333333333)]
    >>> microbatches(np.array([4, 2, 7]), None, microbatch=2, rank=1, world=2)
    [(array([2]), 0.3333333333333333)]
    """
    count = len(batch)
    if count < 1 or microbatch < 1 or not 0 <= rank < world:
        got = f"{count} rows, microbatch {microbatch}, rank {rank} of {world}"
        raise ValueError(f"expected at least one row, a positive microbatch and a rank below their number, got {got}")
    if sizes is not None and (count > microbatch or world > 1):
        batch = batch[np.argsort(sizes, kind="stable")]
    own = batch[rank::world]
    most = -(-count // world)  # rows of the rank that has most
    parts = [own[start : start + microbatch] for start in range(0, most, microbatch)]
    return [(part, len(part) / count) if len(part) else (batch[:1], 0.0) for part in parts]
