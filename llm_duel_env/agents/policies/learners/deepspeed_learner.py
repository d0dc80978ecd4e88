"""Takes optimizer steps with DeepSpeed: ZeRO 1, 2 or 3, offloading, on one rank or many.

Every rank is given the same lesson and takes its share of each batch; after a step all ranks hold equal weights (under
ZeRO 3, equal shares of the same weights). The model is called as the module that it is, not through DeepSpeed's engine:
what ZeRO 3 needs happens in hooks of the layers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from llm_duel_env import ranks
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.deepspeed_config import filled, read_config
from llm_duel_env.agents.policies.learners.deepspeed_state import (
    clear,
    full_shape,
    full_state,
    set_full_state,
    set_full_weight,
)
from llm_duel_env.agents.policies.learners.torch_learner import check_weights
from llm_duel_env.extras import require

TAG = "learner"


class DeepSpeedLearner:
    """AdamW under ZeRO over a model's trainable parameters: a `Learner`. Made on all ranks together.

    Args:
        model: what is trained; it is moved to this rank's device, and under bf16 its weights are rounded (the
            optimizer keeps float32 ones).
        config: batch sizes, clipping and the optimizer's constants, and the file of DeepSpeed's settings.

    Raises:
        ValueError: see `deepspeed_config.filled`.
        MissingExtraError: deepspeed is not installed.
    """

    def __init__(self, model: PreTrainedModel, config: PolicyConfig) -> None:
        document = read_config(config.deepspeed_config)
        deepspeed = start(model.device.type)
        self.model, self.config = model, config
        self.rank, self.world = ranks.rank(), ranks.world()
        self.settings = filled(
            document,
            config,
            world=self.world,
            hidden_size=int(model.config.get_text_config().hidden_size),
            bf16=model.device.type == "cuda",
        )
        self.stage = int(self.settings["zero_optimization"]["stage"])
        self.uniform = self.stage == 3
        self.form = {"ranks": self.world, "settings": json.loads(json.dumps(self.settings))}
        """What ZeRO's own form of a checkpoint depends on."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = list(self.parameters.values())
        optimizer = None
        if "optimizer" not in self.settings:
            optimizer = torch.optim.AdamW(
                trained, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
            )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            config=self.settings,
            dist_init_required=False,
        )
        model.eval()  # DeepSpeed leaves it in training mode: no dropout, ever
        self.gradient_steps = 0
        """Steps taken, those before a `reset` included."""
        self._depth = 0

    def add(self, name: str, module: nn.Module) -> None:
        """Not supported: DeepSpeed's optimizer is fixed when the policy is made."""
        raise ValueError(f"policy.learner: deepspeed trains the policy alone, not {name!r} beside it; take torch")

    def begin(self, learning_rate: float) -> None:
        """See `Engine.begin`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()

    def backward(self, value: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        self.engine.set_gradient_accumulation_boundary(last)
        # The engine's own forward does this; without it ZeRO 3 would keep the last microbatch's gradients alone.
        self.optimizer.clear_backward_seen_flag()
        # DeepSpeed takes the mean over ranks; the loop's weights ask for the sum.
        self.engine.backward(value * self.world, scale_wrt_gas=False)

    def step(self) -> float:
        """See `Engine.step`. The norm is that of all ranks' gradients together.

        Raises:
            RanksDiffer: the ranks' weights have drifted apart. Under ZeRO 3 none holds what another does.
        """
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if self.optimizer.overflow or norm is None or not np.isfinite(float(norm)):
            raise FloatingPointError(
                f"the policy's gradient norm is {norm} at step {self.gradient_steps}: training diverged; "
                "its weights were left as they were"
            )
        self.gradient_steps += 1
        if self.stage != 3:
            check_weights(self.gradient_steps, self.parameters)
        return float(norm)

    def total(self, values: list[float]) -> list[float]:
        """See `Engine.total`."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        distributed.all_reduce(sums)
        return sums.tolist()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Learner.whole`. Under ZeRO 3 this gathers all weights on every rank: their memory, and one broadcast."""
        if self.stage != 3 or self._depth:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        self._depth += 1
        try:
            with torch.no_grad(), unwrap_model_for_generation(self.engine):
                yield
        finally:
            self._depth -= 1

    def weights(self) -> dict[str, Tensor]:
        """See `Learner.weights`. Parameters are gathered one at a time."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(self.model.named_parameters())
        # What is left of the state are buffers, and tied parameters under their other names, which are left out: under
        # ZeRO 3 they are placeholders without numbers, and under bf16 they would be rounded.
        held = {parameter.data_ptr() for parameter in parameters.values()}
        others = ((name, value) for name, value in self.model.state_dict().items() if name not in parameters)
        result = {name: value for name, value in others if value.numel() and value.data_ptr() not in held}
        for name, parameter in parameters.items():
            value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if value is None:
                with self._gathered(parameter):
                    value = parameter.detach().float()
                    value = value.clone() if self.rank == 0 else value
            if self.rank == 0:
                result[name] = value.reshape(full_shape(parameter)).cpu()
        return result if self.rank == 0 else {}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Learner.set_weights`. Every rank is given the same."""
        for name, parameter in self.model.named_parameters():
            if name not in weights:
                continue
            value = weights[name].detach().to(self.engine.device)
            if value.shape != full_shape(parameter):
                got = f"{tuple(value.shape)}, expected {tuple(full_shape(parameter))}"
                raise ValueError(f"the weight {name!r} does not fit this model: {got}")
            with torch.no_grad(), self._gathered(parameter, modifier_rank=0):
                if self.stage != 3 or self.rank == 0:
                    parameter.data.copy_(value)
            if parameter.requires_grad:
                set_full_weight(parameter, value.float())

    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=modifier_rank, enabled=self.stage == 3)

    def reset(self) -> None:
        """See `Learner.reset`."""
        clear(self.optimizer)

    def save(self, folder: Path) -> None:
        """Writes into rank 0's folder, which all ranks must see.

        What `TorchLearner.save` writes, and beside it deepspeed/, ZeRO's own form, by all ranks, and deepspeed.json, on
        what that form depends, and its files' hashes.
        """
        folder = Path(ranks.tell(str(folder)))
        # Of the moments, gathered one at a time, rank 0 alone keeps a copy.
        state = full_state(self.optimizer, self.parameters)
        tensors = {name: value.cpu().contiguous() for name, value in state if self.rank == 0}
        self.engine.save_checkpoint(str(folder / "deepspeed"), tag=TAG, exclude_frozen_parameters=True)
        distributed.barrier()
        if self.rank == 0:
            save_file(tensors, folder / "optimizer.safetensors")
            (folder / "optimizer.json").write_text(json.dumps({"gradient_steps": self.gradient_steps}))
            files = sorted(path for path in (folder / "deepspeed" / TAG).iterdir() if path.is_file())
            record = {**self.form, "files": {path.name: _sha256(path) for path in files}}
            (folder / "deepspeed.json").write_text(json.dumps(record, indent=1))
        distributed.barrier()

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, or `TorchLearner.save`.

        On as many ranks and with the same settings as before that is ZeRO's own form. It holds pickles: files whose
        hashes are not those of the record are not opened. Otherwise it is the torch learner's form, which knows neither
        ranks nor stages.

        Raises:
            ValueError: files that were changed, or the state of another model.
        """
        record = folder / "deepspeed.json"
        told = json.loads(record.read_text()) if record.exists() else {}
        if self.form == {name: told.get(name) for name in self.form}:
            self._check_files(folder / "deepspeed" / TAG, told["files"])
            self.engine.load_checkpoint(
                str(folder / "deepspeed"), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
            )
        else:
            set_full_state(self.optimizer, self.parameters, load_file(folder / "optimizer.safetensors"))
        self.gradient_steps = json.loads((folder / "optimizer.json").read_text())["gradient_steps"]

    def _check_files(self, folder: Path, hashes: dict[str, str]) -> None:
        """Checks that a folder holds these files and no others; each rank looks at some."""
        names = sorted(hashes)
        own = names[self.rank :: self.world]
        changed = [n for n in own if not (folder / n).is_file() or _sha256(folder / n) != hashes[n]]
        extra = {path.name for path in folder.iterdir()} - set(names) if folder.is_dir() else set()
        if self.total([float(len(changed) + len(extra))])[0]:
            wrong = sorted({*changed, *extra}) or "some that another rank looked at"
            raise ValueError(f"{folder}: files are missing or not those that were saved: {wrong}")


def start(device: str) -> Any:
    """Makes this process a rank of torch's and DeepSpeed's process group (`ranks.join`); returns the module deepspeed.

    Args:
        device: "cuda" or "cpu", where the model is.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: DeepSpeed would take a GPU that it sees
    deepspeed: Any = require("deepspeed", "policy.learner=deepspeed")
    os.environ.setdefault("LOCAL_RANK", "0")
    ranks.join(device)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")
    return deepspeed


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
