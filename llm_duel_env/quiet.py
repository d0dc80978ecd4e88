"""Keeps transformers' progress bars out of our own output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within the block transformers draws no bars (loading weights, writing shards); a user's own choice comes back."""
    from transformers.utils import logging  # here, because a list of agents does without transformers

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
