"""What is said where a pretrained model cannot be had."""

from __future__ import annotations

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
