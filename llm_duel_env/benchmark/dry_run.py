"""A run before it is played: what it would need, and whether its parts fit together. Nothing is downloaded, bought or
kept."""

from __future__ import annotations

import math
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.rehearsal import Counts, rehearse
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.runner import check_folder
from llm_duel_env.benchmark.session import DIAGNOSED
from llm_duel_env.benchmark.shapes import config_of
from llm_duel_env.benchmark.stand_ins import Shapes, stand_ins
from llm_duel_env.quiet import no_progress_bars

GIB = 1 << 30
PHASES = {
    "begin": "loading", "sample": "sampling", "score": "scoring", "label": "labelling", "learn": "learning",
    "cpu": "main memory",
}  # fmt: skip
"""Kinds of work, and what the table calls them."""
VERDICT = "dry run: all parts fit together"


def dry_run(
    config: RunConfig,
    ranks: int = 1,
    shapes: Shapes | None = None,
    gpu_memory: float | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Plays the run small, and tells what it would need at its full size.

    Args:
        config: the run.
        ranks: processes that would share it.
        shapes: fields of models' configurations by their names, for models that are not at hand.
        gpu_memory: GiB of each GPU; None takes those of this machine's, where it has one.
        console: where to print.

    Returns:
        GiB on each rank by kind of work (`PHASES`); empty on finite tasks.

    Raises:
        ValueError: the run cannot be played as it is told, or a model's configuration is not to be had.
        RuntimeError: its parts do not fit together.
    """
    console = console or _console()
    shapes = shapes or {}
    check_folder(config, RunFolder(config.folder), resume=False)
    console.print(f"{config.agent} on {config.env}, {ranks} rank{'s' if ranks > 1 else ''}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="llm-duel-dry-run-") as folder, no_progress_bars():
        small, notes = stand_ins(config, shapes, Path(folder))
        counts = rehearse(small)
    parts = _parts(config, counts, ranks, shapes, gpu_memory) if counts.kind == "text" else []
    total = {name: sum(getattr(part, name) for part in parts) / GIB for name in PHASES} if parts else {}
    if parts:
        console.print(_memory_table(parts, ranks))
    console.print(_work_table(config, counts))
    for note in [*notes, *_missing(config), *_too_much(total, _gpu(gpu_memory))]:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    seen = (
        f"An evaluation, {counts.rounds} rounds of {counts.prompts} prompts, a save and a load, tiny and in one process"
    )
    if counts.longest_prompt:
        seen += (
            f"; learnt from: prompts up to {counts.longest_prompt} and responses up to {counts.longest_response} tokens"
        )
    if not counts.gradient_steps:
        seen += "; it took no gradient step"
    console.print(f"{seen}\n{VERDICT}", highlight=False, soft_wrap=True)
    return total


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)  # a file or a pipe does not wrap


def _gpu(told: float | None) -> float | None:
    """GiB of each GPU, where anybody knows."""
    if told is not None or not torch.cuda.is_available():
        return told
    return torch.cuda.get_device_properties(0).total_memory / GIB


def _parts(config: RunConfig, counts: Counts, ranks: int, shapes: Shapes, gpu_memory: float | None) -> list[Any]:
    """The parts of a rank's memory, as the agent tells them; see `Agent.footprint`."""
    agent_class = load_agent(config.agent)
    told, view = agent_class.configure(config.overrides), counts.view
    task_kwargs = config.env_kwargs.get("task_kwargs") or {}
    of_text = view.name == "text"
    model = config_of(task_kwargs["model"] if of_text else view.model, shapes)
    encoder = view.encoder if told.policy.encoder == "task" else told.policy.encoder
    gpu = _gpu(gpu_memory)
    limit = getattr(model.get_text_config(), "max_position_embeddings", None) or 1 << 20
    return agent_class.footprint(
        told,
        ranks=ranks,
        prompts=config.batch,
        evaluated=config.eval_prompts,
        candidates=max(counts.candidates, 1),
        ranked=counts.ranked,
        prompt_tokens=view.max_prompt_tokens or min(1024, limit - view.max_new_tokens),
        new_tokens=view.max_new_tokens,
        policy=model,
        from_adapter=of_text and (Path(task_kwargs["model"]) / "adapter_config.json").is_file(),
        encoder=None if encoder == "policy" else config_of(encoder, shapes),
        gpu_bytes=None if gpu is None else gpu * GIB,
        **(_oracle(task_kwargs, shapes) if of_text else {}),
    )


def _oracle(task_kwargs: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """What `Agent.footprint` is told of a reward model that this process would load; other oracles' are not counted."""
    kind, _, name = task_kwargs["oracle"].partition(":")
    if kind != "reward_model":
        return {}
    own = task_kwargs.get("oracle_kwargs") or {}
    device = str(own.get("device", "auto"))
    shared = device in ("auto", "all", "cuda", "cuda:0") or device.startswith("cuda:0,")
    return {
        "reward": config_of(name, shapes),
        "reward_tokens": int(own.get("batch_tokens", 16384)),
        "reward_on": "cpu" if device == "cpu" else "cuda" if shared else "",
    }


def _memory_table(parts: list[Any], ranks: int) -> Table:
    table = Table(
        title=f"GiB on each of {ranks} rank{'s' if ranks > 1 else ''} (~ is an estimate)", title_justify="left"
    )
    table.add_column("part")
    for name in PHASES.values():
        table.add_column(name, justify="right")
    for part in parts:
        cells = [_gib(getattr(part, name), part.estimated) for name in PHASES]
        table.add_row(part.name, *cells)
    table.add_section()
    sums = [sum(getattr(part, name) for part in parts) for name in PHASES]
    table.add_row("together", *(_gib(value, True) for value in sums), style="bold")
    table.caption = (
        "GPUs with matrix products in bfloat16; prompts and responses of the greatest length; no fragmentation. "
        "An agent that moves its reference holds one more model."
    )
    table.caption_justify = "left"
    return table


def _gib(size: float, estimated: bool) -> str:
    if not size:
        return ""
    return f"{'~' if estimated else ''}{size / GIB:.2f}" if size >= 0.005 * GIB else "<0.01"


def _work_table(config: RunConfig, counts: Counts) -> Table:
    """What the whole run does, from what the small one did in a round."""
    told = load_agent(config.agent).configure(config.overrides)
    share, burn_in = getattr(told, "oracle_share", 1.0), getattr(told, "burn_in", 1.0)
    begun = min(burn_in, 1.0) * config.budget
    rounds = math.ceil(begun / config.batch + (config.budget - begun) / max(config.batch * share, 1e-9))
    # A round of fewer prompts than a batch is one step a pass.
    batches = math.ceil(config.batch / told.policy.batch) / math.ceil(counts.prompts / told.policy.batch)
    evaluations = math.floor(1 / config.eval_every + 1e-9) + 1
    rows = [
        ("oracle queries", f"{config.budget:,}"),
        ("rounds", f"~{rounds:,} of {config.batch:,} prompts"),
        ("gradient steps", f"~{round(rounds * counts.gradient_steps / counts.rounds * batches):,}"),
    ]
    if counts.kind == "text" and counts.own + counts.reference:  # else it draws elsewhere, or in no round that was seen
        prompts = rounds * config.batch
        tokens = prompts * (counts.own + counts.reference) * counts.view.max_new_tokens
        rows += [
            ("responses drawn of the policy", f"~{round(prompts * counts.own):,} ({counts.own:g} a prompt)"),
            ("responses drawn of the reference", f"~{round(prompts * counts.reference):,}"),
            ("tokens of all those", f"at most ~{round(tokens):,}"),
        ]
    rows.append(("evaluations", f"{evaluations:,} of {config.eval_prompts:,} prompts, {DIAGNOSED} of them sampled too"))
    table = Table(title="The whole run (~ is an estimate)", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("how much")
    for row in rows:
        table.add_row(*row)
    return table


def _missing(config: RunConfig) -> list[str]:
    """What the run needs and this machine does not have."""
    task_kwargs = config.env_kwargs.get("task_kwargs") or {}
    local = isinstance(task_kwargs.get("prompts"), str) and Path(task_kwargs["prompts"]).expanduser().is_file()
    if task_kwargs.get("preset") and not local and find_spec("datasets") is None:
        return ["the data set is on the hub, and datasets is not installed here: pip install 'llm-duel-env[hub]'"]
    return []


def _too_much(total: dict[str, float], gpu: float | None) -> list[str]:
    if gpu is None or not total:
        return []
    most, phase = max((size, PHASES[name]) for name, size in total.items() if name != "cpu")
    told = f"the most on a GPU is ~{most:.1f} GiB of {gpu:g}, while {phase}"
    return [f"warning: {told}: it may not fit" if most > gpu else told]
