"""The processes of one run: who they are, and what they tell each other.

A run on N ranks is one program, N times: every rank plays the same rounds and holds the same agent. Heavy work is cut
by prompts (`share`, `gather`), and what one rank alone does is told to the others (`tell`). Ranks come from a launcher
(torchrun, deepspeed, `llm-duel run --ranks`); without one there is a single rank, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed


class RanksDiffer(RuntimeError):  # noqa: N818 (an exception that says what happened)
    """The ranks no longer hold the same state."""


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def device() -> str:
    """The GPU of this rank where there is one (the launcher's LOCAL_RANK, else the first), or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def join(device: str) -> None:
    """Makes this process a rank of torch's process group, once: as the launcher says, or a group of one.

    Ranks that wait for another one longer than DEEPSPEED_TIMEOUT minutes (30 where it is not set) fail.

    Args:
        device: "cpu" or one of a GPU, where models are. What is on the CPU goes over gloo, what is on a GPU over nccl.
    """
    if distributed.is_initialized():
        return
    timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        distributed.init_process_group(backend, timeout=timeout)
    else:
        store = distributed.HashStore()
        distributed.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    atexit.register(_leave)


def _leave() -> None:
    """Ends the process group, and with it gloo's threads, before Python is gone: one of them that still holds a tensor
    of the last operation would abort the process where it lets go of it later."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def share(count: int) -> np.ndarray:
    """The rows of `count` that this rank works on, for `gather`: every N-th. A rank for which there is none takes the
    first row again, so that all ranks do the same kinds of work.

    >>> share(3)
    array([0, 1, 2])
    """
    own = np.arange(count)[rank() :: world()]
    return own if len(own) else np.zeros(min(count, 1), np.int64)


def gather(part: Tensor, count: int) -> Tensor:
    """The rows that all ranks made of their `share` of `count`, in order: (count, ...) on every rank.

    Dimensions after the first may differ between ranks; shorter ones are filled with 0 at the end.
    """
    if world() == 1:
        return part
    trailing = torch.tensor(part.shape[1:], dtype=torch.int64)
    distributed.all_reduce(trailing, distributed.ReduceOp.MAX)
    padded = part.new_zeros(-(-count // world()), *trailing.tolist())
    padded[tuple(slice(0, size) for size in part.shape)] = part
    parts = [torch.empty_like(padded) for _ in range(world())]
    distributed.all_gather(parts, padded)
    whole = part.new_empty(count, *trailing.tolist())
    for number, rows in enumerate(parts):
        whole[number :: world()] = rows[: len(range(number, count, world()))]
    return whole


def tell(value: Any = None) -> Any:
    """Rank 0's `value` on every rank: None, numbers, texts and numeric arrays, in lists, tuples (which become lists)
    and dicts by text. Nothing is pickled."""
    if world() == 1:
        return value
    message = torch.from_numpy(np.frombuffer(_packed(value), np.uint8).copy()) if rank() == 0 else None
    size = torch.tensor([0 if message is None else len(message)])
    distributed.broadcast(size, 0)
    if message is None:
        message = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(message, 0)
    return value if rank() == 0 else _unpacked(message.numpy().tobytes())


Rows = Sequence[Any]
Work = Callable[[Rows], np.ndarray]
_works: list[Work] = []


def together(work: Work) -> Work:
    """`work`, which makes of R rows of plain data an array (R, ...), with the rows shared by all ranks.

    The result is called on rank 0 while the others `follow`, or on all ranks alike. To be made on all ranks, in the
    same order.
    """
    if world() == 1:
        return work
    _works.append(work)
    number = len(_works) - 1

    def shared(rows: Rows) -> np.ndarray:
        if not len(rows):
            return work(rows)
        told = tell({"work": number, "rows": rows} if rank() == 0 else None)
        return _own_share(told["work"], told["rows"])

    return shared


def _own_share(number: int, rows: Rows) -> np.ndarray:
    part = _works[number]([rows[row] for row in share(len(rows))])
    return gather(torch.from_numpy(part), len(rows)).numpy()


def lead(value: Any) -> Any:
    """Ends what the others `follow`, and tells them `value`."""
    tell({"done": value})
    return value


def follow() -> Any:
    """What ranks other than 0 do while rank 0 alone is busy: their share of work done `together`, until it is through.
    What it then tells is returned."""
    while "done" not in (told := tell()):
        _own_share(told["work"], told["rows"])
    return told["done"]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives `tensors` rank 0's values, in place."""
    if world() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Gives `tensors` their sums over the ranks, in place."""
    if world() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def any_of(flag: bool) -> bool:
    """Whether any rank says True."""
    if world() == 1:
        return flag
    told = torch.tensor([int(flag)])
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return bool(told.item())


def meet() -> None:
    """Waits for the others."""
    if world() > 1:
        any_of(False)


def check_alike(what: str, tensors: Iterable[Tensor]) -> None:
    """Checks that all ranks hold the same numbers, to the last bit.

    Raises:
        RanksDiffer: they do not; says which ranks differ from rank 0.
    """
    if world() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        # Flat, since a number without a dimension has no bytes to be viewed as.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    own = torch.from_numpy(np.frombuffer(digest.digest()[:8], np.int64).copy())[None]
    found = [torch.empty_like(own) for _ in range(world())]
    distributed.all_gather(found, own)
    others = [number for number, other in enumerate(found) if not torch.equal(other, found[0])]
    if others:
        raise RanksDiffer(f"{what}: expected the same on all ranks, got others than rank 0's on ranks {others}")


def _packed(value: Any) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_tree(value, arrays))
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, tree=np.array(tree), **arrays)
    return file.getvalue()


def _unpacked(message: bytes) -> Any:
    with np.load(io.BytesIO(message), allow_pickle=False) as arrays:
        return _leaves(json.loads(str(arrays["tree"])), arrays)


def _tree(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value as JSON, with arrays put aside; anything else than what `tell` takes is a TypeError."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"expected names that are texts, got {list(value)}")
        return {"dict": {name: _tree(item, arrays) for name, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_tree(item, arrays) for item in value]}
    if isinstance(value, np.ndarray) and value.dtype != object:
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"expected plain data or a numeric array, got {type(value).__name__}")


def _leaves(tree: Any, arrays: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        return arrays[content]
    if kind == "list":
        return [_leaves(item, arrays) for item in content]
    return {name: _leaves(item, arrays) for name, item in content.items()}
