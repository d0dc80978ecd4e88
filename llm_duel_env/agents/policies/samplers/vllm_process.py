"""What an engine of vLLM changes for the whole process, and how the process gets over it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

from llm_duel_env import ranks

_open_engines = 0


def prepare_environment() -> None:
    """What vLLM reads when it is imported or builds an engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: tensors are handed over, not sent
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Puts back what building an engine changes for the whole process.

    On a CPU `torch.set_num_threads`, and libraries that every later child would preload; anywhere the state of torch's
    global generator, objects taken from the garbage collector, and classes of transformers: families that vLLM has no
    code of its own for run through them, and it makes them its own.
    """
    threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    makers: dict[Any, Any] = {model: model.__init__ for model in _subclasses(PreTrainedModel)}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = threads
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
        for model, maker in makers.items():
            if model.__init__ is not maker:
                model.__init__ = maker
                model.do_not_compile = True  # what its new __call__ asks of models that vLLM did not make
        gc.unfreeze()


def open_engine(owner: object, build: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """The engine that `build` makes, and what shuts it down: when called, when `owner` is collected, or when Python ends,
    whichever is first.

    It counts as open from before it is built: another one may be collected meanwhile, and must not take along the
    groups that both share.
    """
    global _open_engines
    _open_engines += 1
    try:
        engine = build()
    except BaseException:
        _open_engines -= 1
        raise
    return engine, weakref.finalize(owner, _shut_down, engine)


def _shut_down(engine: Any) -> None:
    global _open_engines
    _open_engines -= 1
    # Ranks make groups together. Their engines need not be collected at the same moment: one that had taken its groups
    # along would make new ones with the next engine, and wait for the others, which still have theirs.
    with _groups_kept(others=_open_engines > 0 or ranks.world() > 1):
        engine.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _groups_kept(others: bool) -> Iterator[None]:
    """Within the block vLLM's cleanup leaves alone what is not one engine's.

    It destroys torch's default process group, which is the process's: ranks and DeepSpeed may be in it, whoever made
    it. And it destroys vLLM's own groups, which all engines of a process share: not while there are `others` in need of them.
    """
    destroy: Any = distributed.destroy_process_group
    core: Any = sys.modules.get("vllm.v1.engine.core")
    cleanup = getattr(core, "cleanup_dist_env_and_memory", None)

    def destroy_but_the_default(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    distributed.destroy_process_group = destroy_but_the_default
    if others and cleanup is not None:
        core.cleanup_dist_env_and_memory = lambda: None
    try:
        yield
    finally:
        distributed.destroy_process_group = destroy
        if cleanup is not None:
            core.cleanup_dist_env_and_memory = cleanup


def _subclasses(of: Any) -> Iterator[Any]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)
