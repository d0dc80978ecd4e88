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
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from llm_duel_env import ranks
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.deepspeed_config import filled, read_config
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
        trained = [p for p in model.parameters() if p.requires_grad]
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
        """See `Engine.step`. The norm is that of all ranks' gradients together."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if self.optimizer.overflow or norm is None or not np.isfinite(float(norm)):
            raise FloatingPointError(
                f"the policy's gradient norm is {norm} at step {self.gradient_steps}: training diverged; "
                "its weights were left as they were"
            )
        self.gradient_steps += 1
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
                result[name] = value.reshape(self._shape(parameter)).cpu()
        return result if self.rank == 0 else {}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """See `Learner.set_weights`. Every rank is given the same."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if name not in weights:
                continue
            value = weights[name].detach().to(self.engine.device)
            if value.shape != self._shape(parameter):
                got = f"{tuple(value.shape)}, expected {tuple(self._shape(parameter))}"
                raise ValueError(f"the weight {name!r} does not fit this model: {got}")
            with torch.no_grad(), self._gathered(parameter, modifier_rank=0):
                if self.stage != 3 or self.rank == 0:
                    parameter.data.copy_(value)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.float())

    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=modifier_rank, enabled=self.stage == 3)

    @staticmethod
    def _shape(parameter: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def reset(self) -> None:
        """See `Learner.reset`."""
        inner = self.optimizer.optimizer
        for state in inner.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if isinstance(value, Tensor) else 0
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = 0

    def save(self, folder: Path) -> None:
        """Writes deepspeed/ (DeepSpeed's own form, all ranks) and deepspeed.json (what it is, and its files' hashes) into
        rank 0's folder, which all ranks must see.
        """
        folder = Path(ranks.tell(str(folder)))
        self.engine.save_checkpoint(str(folder / "deepspeed"), tag=TAG, exclude_frozen_parameters=True)
        distributed.barrier()
        if self.rank == 0:
            files = sorted(path for path in (folder / "deepspeed" / TAG).iterdir() if path.is_file())
            record = {
                "gradient_steps": self.gradient_steps,
                "ranks": self.world,
                "stage": self.stage,
                "files": {path.name: _sha256(path) for path in files},
            }
            (folder / "deepspeed.json").write_text(json.dumps(record, indent=1))
        distributed.barrier()

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, on as many ranks and under the same stage.

        DeepSpeed's form holds pickles: files whose hashes are not those of the record are not opened.

        Raises:
            ValueError: no such checkpoint, other ranks or another stage, or files that were changed.
        """
        record, inside = folder / "deepspeed.json", folder / "deepspeed" / TAG
        if not record.exists():
            raise ValueError(f"{folder}: expected a checkpoint of the DeepSpeed learner, found no {record.name}")
        told = json.loads(record.read_text())
        if (told["ranks"], told["stage"]) != (self.world, self.stage):
            got = f"{told['ranks']} ranks under ZeRO {told['stage']}"
            raise ValueError(
                f"{folder}: expected {self.world} ranks under ZeRO {self.stage}, got a checkpoint of {got}"
            )
        names = sorted(told["files"])
        own = names[self.rank :: self.world]
        changed = [n for n in own if not (inside / n).is_file() or _sha256(inside / n) != told["files"][n]]
        extra = {path.name for path in inside.iterdir()} - set(names) if inside.is_dir() else set()
        if self.total([float(len(changed) + len(extra))])[0]:
            wrong = sorted({*changed, *extra}) or "some that another rank looked at"
            raise ValueError(f"{inside}: files are missing or not those that were saved: {wrong}")
        self.engine.load_checkpoint(
            str(folder / "deepspeed"), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        self.gradient_steps = told["gradient_steps"]


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
