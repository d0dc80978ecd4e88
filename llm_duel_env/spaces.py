"""A Gymnasium space for real text: any Unicode, not the fixed character set of `gymnasium.spaces.Text`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_differing_spaces, create_empty_array

# First and last code point of what `sample` draws from; assigned, printable characters only.
_SCRIPTS = (
    (0x20, 0x7E),  # ASCII with the space
    (0xC0, 0x17F),  # Latin with accents
    (0x391, 0x3A1),  # Greek
    (0x410, 0x44F),  # Cyrillic
    (0x621, 0x63A),  # Arabic
    (0x905, 0x939),  # Devanagari
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FA5),  # CJK ideographs
    (0xAC00, 0xD7A3),  # Hangul
    (0x1F600, 0x1F64F),  # emoji, outside the basic plane
)


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it can unless it holds a lone surrogate.

    >>> is_utf8("naïve 猫 🙂"), is_utf8("\\ud800")
    (True, False)
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Utf8Text(spaces.Space[str]):
    """Strings of `min_length` to `max_length` code points that can be written as UTF-8.

    Every Unicode code point but the surrogates is allowed. Batched spaces are tuples of such strings.

    Example:
        >>> space = Utf8Text(12, seed=1)
        >>> space
        Utf8Text(1, 12)
        >>> "Grüße, 世界 🙂" in space, "" in space, "\\ud800" in space, 3 in space
        (True, False, False, False)
        >>> space.sample() in space
        True
        >>> space == Utf8Text(12), space == Utf8Text(12, min_length=0)
        (True, False)
    """

    def __init__(self, max_length: int, *, min_length: int = 1, seed: int | np.random.Generator | None = None) -> None:
        """A space of strings.

        Args:
            max_length: The most code points a string may have.
            min_length: The fewest; 0 allows the empty string.
            seed: Seed of `sample`.

        Raises:
            TypeError: A length that is not an integer.
            ValueError: Not 0 <= min_length <= max_length.
        """
        for name, value in (("max_length", max_length), ("min_length", min_length)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        if not 0 <= min_length <= max_length:
            raise ValueError(f"expected 0 <= min_length <= max_length, got {min_length} and {max_length}")
        self.min_length, self.max_length = int(min_length), int(max_length)
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """A string of random length in mixed scripts: ASCII, accents, Greek, CJK, emoji, ...

        Args:
            mask: None, or ``(length, None)`` to fix the length. The second entry, Gymnasium's mask over a character
                set, must be None: all of Unicode is allowed here.
            probability: As `mask`; not both.

        Raises:
            ValueError: Both are given, a character mask is given, or the length is outside the space.
        """
        if mask is not None and probability is not None:
            raise ValueError("expected one of mask and probability, got both")
        length = self._length_from(probability if mask is None else mask)
        scripts = self.np_random.integers(0, len(_SCRIPTS), size=length)
        first, last = np.array(_SCRIPTS).T[:, scripts]
        return "".join(map(chr, self.np_random.integers(first, last + 1)))

    def _length_from(self, mask: Any | None) -> int:
        if mask is not None and (not isinstance(mask, tuple) or len(mask) != 2 or mask[1] is not None):
            raise ValueError(f"mask, probability: expected None or (length, None), got {mask!r}")
        length = None if mask is None else mask[0]
        if length is None:
            return int(self.np_random.integers(self.min_length, self.max_length + 1))
        if not self.min_length <= length <= self.max_length:
            raise ValueError(f"length: expected {self.min_length} to {self.max_length}, got {length}")
        return int(length)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a str of an allowed length without lone surrogates."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length and is_utf8(x)

    @property
    def is_np_flattenable(self) -> bool:
        """False: there is no array of fixed size for it."""
        return False

    def __repr__(self) -> str:
        return f"Utf8Text({self.min_length}, {self.max_length})"

    def __eq__(self, other: object) -> bool:
        lengths = (self.min_length, self.max_length)
        return isinstance(other, Utf8Text) and lengths == (other.min_length, other.max_length)


# `batch_space`, `concatenate` and `iterate` serve any custom space (as a tuple); these two need telling.


@create_empty_array.register(Utf8Text)
def _create_empty_texts(space: Utf8Text, n: int = 1, fn: Callable = np.zeros) -> tuple[str, ...]:
    return (" " * space.min_length,) * n


@batch_differing_spaces.register(Utf8Text)
def _batch_differing_texts(texts: Sequence[Utf8Text]) -> spaces.Tuple:  # type: ignore[misc]  # it dispatches on elements
    return spaces.Tuple([deepcopy(space) for space in texts], seed=deepcopy(texts[0].np_random))
