"""Trains a model on pairs with torch's AdamW, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_duel_env.agents.policies.base import DirectOptimizer, PairLogProbs, PolicyConfig, learning_rate
from llm_duel_env.types import Candidates, Metrics


class TorchLearner:
    """AdamW over a model's parameters, with its moments."""

    def __init__(self, model: nn.Module, config: PolicyConfig) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.gradient_steps = 0

    def update(
        self,
        loss: DirectOptimizer,
        pairs: Candidates,
        reference: Tensor,
        log_probs: Callable[[Candidates], Tensor],
        *,
        progress: float,
        rng: np.random.Generator,
    ) -> Metrics:
        """`passes` passes over B pairs, in shuffled batches, each in microbatches whose gradients add up.

        Args:
            loss: called on each microbatch.
            pairs: (B, 2), the winner in column 0.
            reference: (B, 2) log-probabilities under the reference, on the model's device.
            log_probs: the policy's log-probabilities of pairs (b, 2), with gradient.
            progress: share of the budget spent; sets the learning rate.
            rng: shuffles.

        Returns:
            See `Policy.update`.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are left as they were before its step.
        """
        assert pairs.lengths is not None
        config, count, device = self.config, pairs.shape[0], reference.device
        rate = learning_rate(config, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tags = np.zeros(pairs.shape, bool) if pairs.from_reference is None else pairs.from_reference
        totals: dict[str, float] = {}
        steps = 0
        for _ in range(config.passes):
            order = rng.permutation(count)
            for batch in (order[i : i + config.batch] for i in range(0, count, config.batch)):
                self.optimizer.zero_grad(set_to_none=True)
                for rows in (batch[i : i + config.microbatch] for i in range(0, len(batch), config.microbatch)):
                    part = PairLogProbs(
                        policy=log_probs(pairs.rows(rows)),
                        reference=reference[torch.as_tensor(rows, device=device)],
                        lengths=torch.as_tensor(pairs.lengths[rows], device=device),
                        from_reference=torch.as_tensor(tags[rows], device=device),
                    )
                    value, metrics = loss(part)
                    (value * (len(rows) / len(batch))).backward()
                    for name, scalar in {**metrics, "loss": float(value.detach())}.items():
                        totals[name] = totals.get(name, 0.0) + scalar * len(rows) / (count * config.passes)
                norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip))
                if not np.isfinite(norm):
                    raise FloatingPointError(
                        f"gradient norm is {norm} at step {self.gradient_steps}: training diverged"
                    )
                self.optimizer.step()
                self.gradient_steps += 1
                steps += 1
                totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm
        totals["grad_norm"] /= steps
        self.optimizer.zero_grad(set_to_none=True)
        return {**totals, "learning_rate": rate, "gradient_steps": float(steps), "pairs": float(count)}

    def save(self, folder: Path) -> None:
        """Writes optimizer.safetensors (moments and step of every parameter) and optimizer.json."""
        tensors = {
            f"{name}/{kind}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"gradient_steps": self.gradient_steps}))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote. ValueError where it belongs to other parameters."""
        tensors = load_file(folder / "optimizer.safetensors")
        self.optimizer.state.clear()
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            if name not in self.parameters or (value.ndim and value.shape != self.parameters[name].shape):
                raise ValueError(f"{folder}: the optimizer state of {name!r} does not fit this model")
            # AdamW keeps its step count on the CPU, whatever the device of the parameter.
            device = "cpu" if kind == "step" else self.parameters[name].device
            self.optimizer.state[self.parameters[name]][kind] = value.to(device)
        self.gradient_steps = json.loads((folder / "optimizer.json").read_text())["gradient_steps"]
