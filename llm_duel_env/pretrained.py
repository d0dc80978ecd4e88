"""Where pretrained models come from: what is said where one cannot be had, and which version of one it is."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(model: str | os.PathLike[str], what: str = "model") -> Iterator[None]:
    """Within the block `model`, a folder or a name on the hub, is loaded as `what`.

    Raises:
        ValueError: there is no such folder and no such model on the hub, or its files cannot be read.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        wanted = "expected a folder with one, or its name on the hub"
        raise ValueError(f"cannot load {what} {str(model)!r}: {wanted} ({reason})") from error


@functools.cache
def hub_commit(name: str) -> str | None:
    """The commit that a hub name stands for, 40 hex digits; None where the hub and its cache tell none."""
    from transformers import AutoConfig  # heavy

    try:
        return getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "_commit_hash", None)
    except (OSError, ValueError):  # no such name, no network, or no configuration
        return None
