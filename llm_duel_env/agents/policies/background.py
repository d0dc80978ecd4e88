"""One-round-off learning: a policy acts as it was before the lesson that it is learning meanwhile.

While the learner works on round t, the sampler and the oracle work on round t + 1. What was learnt is taken on when the
next lesson begins, so a duel is always proposed by the policy of one lesson before: off-policy by one round, and the
same however fast either side is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_duel_env import ranks
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.types import Metrics


class Background:
    """Learns one lesson at a time in a thread of its own, on weights of its own.

    Args:
        trained: what the learner trains.
        whole: within it `trained` has all its weights on this rank.
    """

    def __init__(self, trained: nn.Module, whole: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.trained, self.whole = trained, whole
        self.acting = copy.deepcopy(trained)
        """What the policy acts by."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learn")
        self._running: Future[Metrics] | None = None
        self._learnt: Metrics | None = None  # a lesson that is over and not taken on yet

    def start(self, lesson: Callable[[], Metrics]) -> None:
        """Begins a lesson; the one before must be settled."""
        if self._running is not None or self._learnt is not None:
            raise RuntimeError("a lesson is under way or not taken on yet: call settle() first")
        self._running = self._pool.submit(lesson)

    def wait(self) -> None:
        """Waits for the lesson under way. Raises what it raised."""
        if self._running is not None:
            running, self._running = self._running, None
            self._learnt = running.result()

    def settle(self) -> Metrics:
        """Waits for the lesson under way and takes on what it taught; its metrics, or {} where there was none."""
        self.wait()
        if self._learnt is None:
            return {}
        learnt, self._learnt = self._learnt, None
        self.take_on()
        return learnt

    def take_on(self) -> None:
        """The policy acts by the trained weights from here on."""
        with torch.no_grad(), self.whole():
            for own, new in zip(self.acting.parameters(), self.trained.parameters(), strict=True):
                own.copy_(new)

    def save(self, folder: Path) -> None:
        """Writes what the policy acts by and what the lesson that it has not taken on told, once that lesson is over."""
        self.wait()
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.acting.named_parameters()}
        save_file(tensors, folder / "acting.safetensors")
        (folder / "acting.json").write_text(json.dumps({"learnt": self._learnt}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        tensors = load_file(folder / "acting.safetensors")
        with torch.no_grad():
            for name, value in self.acting.named_parameters():
                value.copy_(tensors[name])
        self._learnt = json.loads((folder / "acting.json").read_text())["learnt"]


def check(config: PolicyConfig) -> None:
    """ValueError where a policy's settings do not go with learning in the background."""
    if config.lora_rank:
        raise ValueError("policy.asynchronous: with LoRA the reference is the policy that trains; take lora_rank=0")
    if ranks.world() > 1:
        raise ValueError(f"policy.asynchronous: expected one rank, got {ranks.world()}")
