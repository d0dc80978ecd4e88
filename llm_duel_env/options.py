"""The commands of ``llm-duel`` and their options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


def _told(metavar: str) -> Any:
    """An option that its help says the default of, where there is anything to say."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Pairs = tuple[tuple[str, ...], ...]
"""KEY=VALUE words, by how often the option is given."""


@dataclass
class Run:
    """Plays one run: one agent, one environment, one seed, one budget of oracle queries.

    Settings come from the paper's defaults, then the recipe of the task (what differs is printed), then --set.
    The run stops cleanly on Ctrl-C and goes on with --resume; no label is bought twice.

    Example: llm-duel run --agent sea --env duel/TinyTLDR-v0 --seed 3 --budget 5000 --set policy.learning_rate=1e-4
    """

    agent: Annotated[str | None, _told("NAME")] = None
    """Name of the agent: see `llm-duel list agents`; or FILE.py:CLASS, whose code is then run."""
    env: Annotated[str | None, _told("NAME")] = None
    """Environment: see `llm-duel list envs`."""
    seed: Annotated[int | None, _told("INT")] = None
    """Seeds prompts, labels and agent (default 0)."""
    budget: Annotated[int | None, _told("INT")] = None
    """Oracle queries that may be bought (default 1000)."""
    batch: Annotated[int | None, _told("INT")] = None
    """Prompts per round (default 32)."""
    set: Annotated[Pairs, tyro.conf.UseAppendAction, _told("KEY=VALUE ...")] = ()
    """Settings of the agent, e.g. policy.learning_rate=1e-4 candidates=10."""
    env_set: Annotated[Pairs, tyro.conf.UseAppendAction, _told("KEY=VALUE ...")] = ()
    """Settings of the environment, e.g. flip_rate=0.1 task_kwargs.candidates=16."""
    recipe: bool = True
    """Start from the recipe of (task, agent); --no-recipe starts from the paper's defaults."""
    eval_every: Annotated[float | None, _told("FLOAT")] = None
    """Share of the budget between evaluations (default 0.02)."""
    eval_prompts: Annotated[int | None, _told("INT")] = None
    """Held-out prompts per evaluation (default 512)."""
    checkpoint_every: Annotated[float | None, _told("FLOAT")] = None
    """Seconds between checkpoints (default 60)."""
    folder: Annotated[Path | None, _told("FOLDER")] = None
    """Where the run goes (default runs/ENV/AGENT/seed-N)."""
    resume: Annotated[Path | None, _told("FOLDER")] = None
    """Folder of a run to go on with; other options, where given, must agree with it."""
    config: Annotated[Path | None, _told("FILE")] = None
    """A YAML file with the settings of a run, e.g. one of examples/runs; options given here override it."""
    dry_run: bool = False
    """Estimate memory and work, play two rounds with tiny weights in a folder that is thrown away, and end. Nothing is
    downloaded, bought or kept; with --ranks, for so many."""
    ranks: int = 1
    """Processes on this machine that share the run's work; for several machines start the command with torchrun or
    deepspeed. A resumed run may have another number."""


@dataclass
class Bench:
    """Plays all runs of a suite in parallel, in processes or on Ray. Finished runs are skipped, begun ones resumed.

    Whole suites take hours: --dry-run tells what there is, and --only plays a part.

    Example: llm-duel bench paper-sea --only 'synthetic/sea*' online_dpo --jobs 2
    """

    suite: tyro.conf.Positional[str]
    """A suite of the package (`llm-duel list suites`) or a YAML file."""
    out: Annotated[Path | None, _told("FOLDER")] = None
    """Where the runs go (default runs/SUITE)."""
    jobs: Annotated[int | None, _told("INT")] = None
    """Processes, each with one thread (default: as many as there are cores)."""
    results: Annotated[Path | None, _told("FOLDER")] = None
    """A folder of kept results, e.g. benchmark/results: runs that it has are not played, and the results of those that
    are go there, small."""
    only: Annotated[tuple[str, ...], _told("[TASK/]LABEL ...")] = ()
    """Plays these runs of the suite alone: labels, with the task (synthetic, pool, tiny_tldr), the environment or the
    folder's name before them where that matters; * and ? as in file names."""
    pool: Annotated[Path | None, _told("FOLDER")] = None
    """The pool that runs on duel/Pool-v0 play on, made by `llm-duel pool build` (default: the environment variable
    LLM_DUEL_POOL; without either these runs are left out)."""
    ray: Annotated[str | None, _told("ADDRESS")] = None
    """Play on a Ray cluster instead (extra `ray`), one CPU each: HOST:PORT, ray://HOST:PORT, auto (the cluster of this
    machine), or local (one started for this command alone). --out and the folder the command is given in must lie on a
    file system that all nodes see under the same path; --jobs bounds the runs at once (default: the cluster's CPUs)."""
    ray_gpus: Annotated[float, _told("GPUS")] = 0.0
    """GPUs of each run on Ray: a whole number, or a share such as 0.5 of one that several runs then have."""
    dry_run: bool = False
    """Print what the suite consists of, and what of it is played already, and end."""


@dataclass
class Board:
    """The board of every agent, in Markdown, from kept results (see `bench --results`).

    Example: llm-duel board --results benchmark/results --out benchmark.md
    """

    results: Path = Path("benchmark/results")
    """Folder of kept results."""
    out: Path = Path("benchmark.md")
    """File to write."""
    suites: Annotated[tuple[str, ...], _told("SUITE ...")] = ()
    """Suites that it is made of (default: the package's board suites)."""
    notes: Annotated[Path | None, _told("FILE")] = None
    """A Markdown file to add at its end."""


@dataclass
class Leaderboard:
    """Tables and learning curves from finished runs, searched for below the folders given.

    Archives of `llm-duel submit` stand beside folders; they are checked whole before a figure of them is used.

    Example: llm-duel leaderboard runs/demo theirs.zip --rerun --out report
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders and archives."""
    out: Annotated[Path | None, _told("FOLDER")] = None
    """Also write Markdown, CSV, JSON, figures and the HTML report into this folder."""
    html: Annotated[Path | None, _told("FILE")] = None
    """Also write the report as one HTML file that needs no network: tables, curves, every run, sample duels as text."""
    parquet: bool = False
    """Also write all figures of all rows as leaderboard.parquet there (extra `parquet`)."""
    suite: Annotated[str | None, _told("SUITE")] = None
    """Only the runs of this suite (a name or a YAML file), under its labels, whatever suite they were played for."""
    against: Annotated[tuple[str, ...], _told("LABEL ...")] = ()
    """Also compare the others with these, paired by seed, as they are with online_dpo."""
    rerun: Annotated[tuple[int, ...] | None, _told("[ROUNDS]")] = None
    """Play the first rounds (default 20) of every entry again, from seed and settings, and compare labels and
    evaluations with what the entry holds. Entries that are not replayed are marked self-reported."""
    rerun_seeds: int = 1
    """Seeds of each entry that --rerun plays, drawn; 0 is all."""


@dataclass
class Submit:
    """Packs finished runs into one archive that others can check: results, settings, commands, versions, ledgers and
    metrics, with a manifest of hashes; no checkpoints.

    Runs that are unfinished, lack a seed that others have, differ in budget, or whose files do not fit together are
    refused, and nothing is written.

    Example: llm-duel submit runs/mine --out mine.zip --by 'A. Person' --description 'my agent, ten seeds' --check
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or with runs below them."""
    out: Path
    """The archive to write, FILE.zip."""
    by: Annotated[str, _told("NAME")]
    """Who made the runs."""
    description: Annotated[str, _told("TEXT")]
    """What they are, in a line or two."""
    seeds: Annotated[tuple[int, ...], _told("SEED ...")] = ()
    """The seeds that every agent must have (default: 0 to the highest, without a gap)."""
    check: Annotated[tuple[int, ...] | None, _told("[ROUNDS]")] = None
    """Play the first rounds (default 20) of one seed of every entry again before packing, and refuse what differs."""


@dataclass
class Enter:
    """Enters an agent into a leaderboard: plays it under a suite's settings, seed by seed beside others, and prints the
    table. Runs that are over are not played again.

    Example: llm-duel enter my_agent.py:MyAgent
    """

    agent: tyro.conf.Positional[str]
    """The name of an installed agent (`llm-duel list agents`), or FILE.py:CLASS, whose code is then run."""
    suite: str = "spine-synthetic"
    """A suite of the package (`llm-duel list suites`) or a YAML file: its environments, seeds, budgets and rounds."""
    against: Annotated[tuple[str, ...], _told("AGENT ...")] = ("online_dpo",)
    """Whom to play beside it."""
    results: Annotated[Path | None, _told("FOLDER")] = None
    """A folder of kept results, e.g. benchmark/results: all agents of the suite that it has stand in the table."""
    out: Annotated[Path | None, _told("FOLDER")] = None
    """Where runs go (default runs/SUITE-entry), with the report in its folder report."""
    jobs: Annotated[int | None, _told("INT")] = None
    """Processes, each with one thread (default: as many as there are cores)."""


@dataclass
class Export:
    """What a run leaves for others: the labels it bought as a preference data set, or its language model.

    preferences: JSON lines of prompt, chosen and rejected, which `datasets` loads and TRL's trainers take as they are;
    ties left out. policy: an ordinary folder of transformers, with the tokenizer; adapters are merged.

    Example: llm-duel export runs/TinyTLDR-v0/sea/seed-3 --out preferences.jsonl
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """File (preferences) or folder (policy) to write."""
    what: Literal["preferences", "policy"] = "preferences"
    """What to write."""


@dataclass
class Pool:
    """Makes a pool for duel/Pool-v0 of any data with several scored responses a prompt.

    Rows are checked, texts that a prompt has twice stand once, prompts are cut to one number of responses, and texts
    are embedded. A path such as completions[].response looks into a list of objects.

    Example: llm-duel pool build openbmb/UltraFeedback --preset ultrafeedback --encoder ENCODER --out pool
    """

    action: tyro.conf.Positional[Literal["build"]]
    """What to do."""
    source: tyro.conf.Positional[str]
    """A JSONL (or .jsonl.gz) or parquet file, or a data set on the hub."""
    out: Path
    """The folder to write."""
    encoder: Annotated[str | None, _told("MODEL")] = None
    """Folder or hub name of an encoder: texts become the unit mean of its last hidden states."""
    embeddings: Annotated[Path | None, _told("FILE")] = None
    """A .npz file made beforehand instead: prompt (R, D) and response (R, K, D), in the order of the rows."""
    preset: Annotated[Literal["ultrafeedback", "nectar", "alpaca_eval"] | None, _told("NAME")] = None
    """Columns of a known data set: ultrafeedback, nectar, alpaca_eval."""
    prompt: Annotated[str | None, _told("COLUMN")] = None
    """The prompt's column (default prompt)."""
    responses: Annotated[str | None, _told("COLUMN")] = None
    """The responses' (default responses)."""
    scores: Annotated[str | None, _told("COLUMN")] = None
    """The scores' (default scores)."""
    sources: Annotated[str | None, _told("COLUMN")] = None
    """Who wrote them (default: not kept)."""
    scale: Annotated[Literal["utility", "probability", "rank"] | None, _told("KIND")] = None
    """What a score is: a utility in logits (default), a probability, a rank of which 1 is the best."""
    logits: Annotated[float | None, _told("FLOAT")] = None
    """How many logits one unit of a utility or a rank is worth (default 1)."""
    candidates: Annotated[int | None, _told("INT")] = None
    """Responses per prompt (default: the number for which most are kept)."""
    max_tokens: int = 256
    """Longer texts are cut before they are embedded."""
    split: str = "train"
    """Of a data set on the hub."""
    seed: int = 0
    """Draws which responses of a prompt are kept."""


@dataclass
class List:
    """What there is: agents, environments, direct optimizers (losses), suites.

    Example: llm-duel list agents
    """

    what: tyro.conf.Positional[Literal["agents", "envs", "losses", "suites", "all"]] = "all"
    """Which list."""


@dataclass
class Demo:
    """The demo suite, then its leaderboard: agents against one another in minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Where runs, tables and figures go."""
    jobs: Annotated[int | None, _told("INT")] = None
    """Processes, each with one thread (default: as many as there are cores)."""


@dataclass
class ServeOracle:
    """Serves a reward model to runs on this machine, or, with a token, on others. Stops on Ctrl-C.

    Needs the extra: pip install 'llm-duel-env[serve]'

    Example: llm-duel serve-oracle path/to/reward_model --port 8765
    """

    model: tyro.conf.Positional[str]
    """Folder or hub name of a reward model."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1, or 0.0.0.0 or :: for all, which needs --token-env."""
    port: int = 8765
    """Port to listen on."""
    token_env: Annotated[str | None, _told("NAME")] = None
    """Environment variable with the token that every request must bring."""
    name: str = ""
    """Name of the model in answers (default: the folder's)."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """What the model runs on."""
    devices: Annotated[int | None, _told("INT")] = None
    """Devices, each with a copy of the model (default: all GPUs)."""
    workers_per_device: int = 1
    """Copies of the model per device."""
    max_batch: int = 16
    """Requests that go through the model together."""
    batch_wait: float = 0.01
    """Seconds that a request waits for others to go with."""
    timeout: float = 120.0
    """Seconds after which a request that still waits is sent away."""
    max_request_bytes: int = 8 * 2**20
    """A longer request is refused."""
    max_texts: int = 256
    """A request of more texts is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights."""
    batch_tokens: int = 16384
    """The most tokens of a forward pass."""
    text_template: Annotated[str | None, _told("TEXT")] = None
    """Text with {prompt} and {response} (default: the tokenizer's chat template)."""
