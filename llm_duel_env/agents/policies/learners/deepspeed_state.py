"""AdamW's state under ZeRO, put together and taken apart: what `TorchLearner` keeps of a parameter, by the same names.

ZeRO has a few flat tensors on each rank, each a share of many parameters, and AdamW's moments beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_state(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The moments ``name/exp_avg`` and ``name/exp_avg_sq`` (as the parameter, float32) and ``name/step`` (), of one
    parameter after the other, whole on every rank. Nothing before the first step. On all ranks together.

    Args:
        optimizer: ZeRO's.
        parameters: those that train, by name.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, flats = optimizer.optimizer, _flats(optimizer)
    if not inner.state.get(flats[0]):
        return
    _link(optimizer)
    step = float(inner.state[flats[0]]["step"])  # one for all parameters: they step together
    for name, parameter in parameters.items():
        for kind in MOMENTS:
            yield f"{name}/{kind}", safe_get_full_optimizer_state(parameter, kind)
        yield f"{name}/step", torch.tensor(step)


def set_full_state(optimizer: Any, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Takes the place of the present state; a parameter of which `tensors` has nothing begins anew.

    Args:
        optimizer: ZeRO's.
        parameters: those that train, by name.
        tensors: as of `full_state`, the same on every rank.

    Raises:
        ValueError: state of other parameters, or parameters that are not equally many steps old.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters or (kind in MOMENTS and value.shape != full_shape(parameters[name])):
            raise ValueError(f"the optimizer state of {name!r} does not fit this model")
    steps = {float(value) for key, value in tensors.items() if key.endswith("/step")}
    if len(steps) > 1:
        raise ValueError(f"ZeRO counts one step for all parameters, got several: {sorted(steps)}")
    _begin(optimizer, steps.pop() if steps else 0.0)
    _link(optimizer)
    for name, parameter in parameters.items():
        for kind in MOMENTS:
            if (moment := tensors.get(f"{name}/{kind}")) is None:
                continue
            if hasattr(parameter, "ds_id"):
                _set_share(parameter, moment, kind)
            else:
                safe_set_full_optimizer_state(parameter, moment, kind)


def set_full_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Puts a whole tensor (as the parameter) into the float32 weights that the optimizer keeps."""
    from deepspeed.utils import safe_set_full_fp32_param

    if hasattr(parameter, "ds_id"):
        _set_share(parameter, value)
    else:
        safe_set_full_fp32_param(parameter, value)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO 3 has scattered it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def clear(optimizer: Any) -> None:
    """Forgets the moments."""
    inner = optimizer.optimizer
    for state in inner.state.values():
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else 0
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = 0


def _begin(optimizer: Any, step: float) -> None:
    """Moments of 0 after `step` steps. AdamW makes its state in its first step; here it is needed before."""
    inner = optimizer.optimizer
    for flat in _flats(optimizer):
        state = inner.state[flat]
        for kind in MOMENTS:
            state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(flat.data)
        state["step"] = torch.tensor(step) if isinstance(inner, torch.optim.AdamW) else int(step)


def _flats(optimizer: Any) -> list[Tensor]:
    """This rank's flat tensors, by which AdamW knows its state."""
    scattered = hasattr(optimizer, "fp32_partitioned_groups_flat")  # ZeRO 3
    return optimizer.fp32_partitioned_groups_flat if scattered else optimizer.single_partition_of_fp32_groups


def _link(optimizer: Any) -> None:
    """Under ZeRO 1 and 2 tells parameters where their moments are now. DeepSpeed does it in its first step alone, and a
    checkpoint that is loaded puts others in their place."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)


def _set_share(parameter: Any, value: Tensor, kind: str | None = None) -> None:
    """Puts this rank's share of a whole tensor in its place, under ZeRO 3. Shares are of equal length: the last one is
    filled up, which DeepSpeed's setters of whole tensors do not do."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    rank, count = torch.distributed.get_rank(), parameter.ds_tensor.numel()
    share = value.flatten()[rank * count : (rank + 1) * count]
    share = nn.functional.pad(share, (0, count - len(share)))
    if kind is None:
        safe_set_local_fp32_param(parameter, share)
    else:
        safe_set_local_optimizer_state(parameter, share, kind)
