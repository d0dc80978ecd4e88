"""Keyed randomness: every random draw is a pure function of a seed and of what the draw is for.

No generator is carried from round to round, so there is no generator state to save, and a draw depends neither on the
size of the batch it is made in nor on the rank that makes it.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def _entropy(seed: int, key: tuple[int | str, ...]) -> list[int]:
    """The words that name a stream; a str is hashed by CRC-32 (Python's own hash changes from process to process).

    The key's length is one of them, since SeedSequence pads with zeros: ("x",) and ("x", 0) would else be one stream.
    """
    words = (zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key)
    return [int(seed), len(key), *words]


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator for the stream named `key`, e.g. ``generator(seed, "prompts", epoch)``.

    >>> bool(generator(1, "a", 2).random() == generator(1, "a", 2).random())
    True
    >>> bool(generator(1, "a", 2).random() == generator(1, "a", 3).random())
    False
    """
    return np.random.default_rng(np.random.SeedSequence(_entropy(seed, key)))


def torch_generator(seed: int, *key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the stream named `key`, on `device`."""
    state = np.random.SeedSequence(_entropy(seed, key)).generate_state(2, np.uint32)
    return torch.Generator(device=device).manual_seed(int(state[0]) << 31 ^ int(state[1]))


def uniforms(seed: int, name: str | tuple[int | str, ...], numbers: np.ndarray) -> np.ndarray:
    """One uniform draw in [0, 1) for each of `numbers` (any shape), a function of (seed, name, number) alone; float64.

    SplitMix64 (Steele, Lea and Flood 2014) of the number, begun at a state hashed from (seed, name) and keyed by a
    second one: thousands of draws take microseconds, where as many generators would take tens of milliseconds.
    """
    stream = (name,) if isinstance(name, str) else name
    start, key = np.random.SeedSequence(_entropy(seed, stream)).generate_state(2, np.uint64)
    with np.errstate(over="ignore"):
        state = np.asarray(numbers).astype(np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        bits = _mix(_mix(state) ^ key)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def visits(numbers: np.ndarray) -> np.ndarray:
    """How often each of `numbers` (M,) came before in the array: (M,) int64.

    >>> visits(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(numbers, kind="stable")
    _, counts = np.unique(numbers, return_counts=True)
    earlier = np.empty(len(numbers), np.int64)
    earlier[order] = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return earlier


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
