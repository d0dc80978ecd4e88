"""The duels an ensemble learns from: features of winner and loser, never text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class PairBuffer:
    """The last `capacity` labelled duels as features (2, D), winner first. Memory grows with what is stored."""

    def __init__(self, capacity: int, feature_size: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.capacity, self.feature_size = capacity, feature_size
        self.added = 0
        self._pairs = torch.empty(0, 2, feature_size)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, pairs: Tensor) -> None:
        """Stores duels, (B, 2, D) with the winner in row 0; once full, the oldest make room."""
        if pairs.ndim != 3 or pairs.shape[1:] != (2, self.feature_size):
            raise ValueError(f"pairs: expected (B, 2, {self.feature_size}), got {tuple(pairs.shape)}")
        pairs = pairs.detach().to("cpu", torch.float32)
        needed = min(self.added + len(pairs), self.capacity)
        if needed > len(self._pairs):
            grown = torch.empty(min(max(2 * len(self._pairs), needed, 256), self.capacity), 2, self.feature_size)
            grown[: len(self)] = self._pairs[: len(self)]
            self._pairs = grown
        kept = pairs[-self.capacity :]
        start = self.added + len(pairs) - len(kept)
        self._pairs[(start + torch.arange(len(kept))) % self.capacity] = kept
        self.added += len(pairs)

    def sample(self, count: int, generator: np.random.Generator) -> Tensor:
        """`count` stored duels drawn uniformly with replacement: (count, 2, D)."""
        if not len(self):
            raise ValueError(f"expected stored duels to sample {count} from, got an empty buffer: add duels first")
        return self._pairs[torch.from_numpy(generator.integers(len(self), size=count))]

    def save(self, path: Path) -> None:
        """Writes what is stored as safetensors."""
        save_file({"pairs": self._pairs[: len(self)].contiguous(), "added": torch.tensor(self.added)}, path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            ValueError: features of another size, or more duels than this buffer holds.
        """
        state = load_file(path)
        added, pairs = int(state["added"]), state["pairs"]
        expected = (min(added, self.capacity), 2, self.feature_size)
        if pairs.shape != expected:
            raise ValueError(f"expected {expected} for {added} duels, got {tuple(pairs.shape)}")
        self.added, self._pairs = added, pairs
