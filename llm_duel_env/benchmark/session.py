"""The state of one run under way, and what is done with it: play a round, evaluate, save, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from llm_duel_env import ranks
from llm_duel_env.benchmark import registry, shared
from llm_duel_env.benchmark.beliefs import Examiner
from llm_duel_env.benchmark.heartbeat import Pulse
from llm_duel_env.benchmark.labels import label_counts
from llm_duel_env.benchmark.outcome import LENGTH_CONTROLLED, TOLD_MORE, known, outcome
from llm_duel_env.benchmark.run_config import RunConfig, env_kwargs_at, env_spec
from llm_duel_env.benchmark.run_folder import (
    MetricsFile,
    RunFolder,
    read_json,
    rounded,
    versions,
    write_json,
)
from llm_duel_env.benchmark.samples import samples
from llm_duel_env.benchmark.statistics import bootstrap_interval
from llm_duel_env.metrics import known_mean, length_controlled, summarise
from llm_duel_env.types import Duels, Metrics

DIAGNOSED = 64
"""Held-out prompts on which KL, entropy and length are measured along the curve; at its end, on all that
are evaluated."""


class Session:
    """A run under way. A context manager: leaving it closes its files and its environment."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        agent_class = registry.load_agent(config.agent)
        env_spec(config.env)
        try:
            self.env = gymnasium.make_vec(
                config.env,
                num_envs=config.batch,
                budget=config.budget,
                ledger=str(folder.ledger) if ranks.rank() == 0 else None,
                **{"scores": "scores" in agent_class.needs, **env_kwargs_at(config.env_kwargs, config.seed)},
            )
        except TypeError as error:  # an argument that the environment or its task does not have
            raise ValueError(f"{config.env} with {config.env_kwargs}: {error}") from error
        self.core = cast(Any, self.env.unwrapped)
        self.fingerprint: str = self.core.task.fingerprint()
        """Of the task's weights and stored responses."""
        folder.check_fingerprint(self.fingerprint)
        self.agent = agent_class(
            self.core.task.view(), agent_class.configure(config.overrides), seed=config.seed, budget=config.budget
        )
        self.examiner = Examiner(self.core.task, self.core.core.feedback)
        self.heldout = self.core.task.heldout_ids[: config.eval_prompts]
        self.time: dict[str, float] = defaultdict(float)
        """Seconds by kind of work, over all sittings of the run."""
        self.logged: dict[str, float] = {}
        """`all_seconds` when the scalars were last written: what came since goes with the next."""
        self.sums: dict[str, float] = defaultdict(float)
        """Totals over rounds: duels shown (of prompts with a reference), online wins in them, regret, gradient steps,
        oracle evaluations beyond labels that the agent was told, tokens generated for duels."""
        self.curve: list[dict[str, float]] = []
        self.marks = 0
        """Evaluation marks passed."""
        self.bought: list[int] = []
        """Queries of each of the last `max_stalled_rounds` rounds."""
        self.truncated = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.env.close()
        for name in ("metrics", "samples", "tensorboard"):  # a start that failed may have opened only some
            if hasattr(self, name):
                getattr(self, name).close()

    @property
    def queries(self) -> int:
        """Queries bought."""
        return int(self.core.query_count)

    @property
    def over(self) -> bool:
        """True when the budget is spent, the environment says so, or the run has stalled."""
        return self.truncated or self.queries >= self.config.budget or self.stalled

    @property
    def stalled(self) -> bool:
        """Whether the last `max_stalled_rounds` rounds together bought less than one round has prompts."""
        return len(self.bought) >= self.config.max_stalled_rounds and sum(self.bought) < self.config.batch

    def pulse(self) -> Pulse:
        """How far the run is, for the heartbeat's thread."""
        if not self.curve:
            return Pulse(self.queries, "starting")
        wins = self.curve[-1]["offline_win_rate"]
        return Pulse(self.queries, f"win rate {wins:.3f}" if known(wins) else "")

    def start(self) -> list[str]:
        """Begins, or goes on from the checkpoint; returns what there is to tell."""
        self.begun = self.saved_at = time.monotonic()
        self.observation, _ = self.env.reset(seed=self.config.seed)
        checkpoint = self.folder.saved()
        state: dict[str, Any] = read_json(checkpoint / "state.json") if checkpoint else {"metrics_bytes": 0}
        if ranks.rank() == 0:
            self.metrics = MetricsFile(self.folder.metrics, keep=state["metrics_bytes"])
            self.samples = MetricsFile(self.folder.samples, keep=state.get("samples_bytes", 0))
            # Scalars of rounds after the checkpoint are about to be written again.
            begin = int(state["env"]["query_count"]) + 1 if checkpoint else 0
            self.tensorboard = SummaryWriter(str(self.folder.tensorboard), purge_step=begin)
        if checkpoint is None:
            with self._clock("prepare"):
                self.agent.prepare(self.core.task.view())
            self.evaluate()
            return []
        self._restore(checkpoint, state)
        return [f"resumed after {self.queries} queries", *changed_versions(self.folder)]

    def play_round(self) -> None:
        """One round: the agent acts, the oracle answers, the agent learns.

        No agent sees the metrics, and only one whose `needs` name the reward or the scores sees those.
        """
        queries = self.queries
        generated = self._generated_tokens()
        with self._clock("act"):
            duels = within_budget(self.agent.act(self.observation), self.config.budget - queries)
        with self._clock("step"):
            self.observation, reward, _, truncated, info = shared.step(self.env, duels.action())
        with self._clock("update"):
            learnt = self.agent.update(duels.judged(info["preference"], **self.agent.told(reward, info)))
        self.truncated = bool(np.all(truncated))
        self.bought = [*self.bought, self.queries - queries][-self.config.max_stalled_rounds :]
        generated = self._generated_tokens() - generated
        self.sums["generated_tokens"] += generated
        tokens: Metrics = {"generated_tokens": generated} if self.core.task.kind == "text" else {}
        self._log("round", self._round_metrics(duels, info, learnt) | tokens)
        self.played = duels, info

    def evaluate_if_due(self) -> None:
        """Evaluates where a mark of the grid was passed, and at the end."""
        marks = int(self.queries / (self.config.eval_every * self.config.budget) + 1e-9)
        if marks > self.marks or self.over:
            self.marks = marks
            self.evaluate()
            self._sample()

    def evaluate(self) -> None:
        """Measures the deployed policy on the held-out prompts."""
        settled: Metrics = {}
        if self.over:  # what is deployed has learnt all
            with self._clock("update"):
                steps = self.agent.policy.settle().get("gradient_steps", 0)
            self.sums["gradient_steps"] += steps
            settled = {"agent/gradient_steps": float(steps)} if steps else {}  # as rounds log theirs
        with self._clock("evaluate"):
            responses = self.agent.respond(self.core.task.observe(self.heldout))
            measured = shared.evaluate_prompts(self.core, responses)
            # Most of an evaluation's time would go here, were it for all prompts.
            diagnosed = self.core.task.observe(self.heldout if self.over else self.heldout[:DIAGNOSED])
            point = summarise(measured) | self.agent.diagnose(diagnosed)
            beliefs: Metrics = {}
            if self.examiner.due(self.agent, self.queries, self.config.budget, last=self.over):
                deployed = responses[: len(diagnosed["prompt_id"])]
                beliefs = self.examiner.examine(self.agent, diagnosed, deployed, measured, self.queries, last=self.over)
        if self.over and "length_difference" in measured:
            point[LENGTH_CONTROLLED] = length_controlled(measured["offline_win_rate"], measured["length_difference"])
        wins = measured["offline_win_rate"]
        if (judged := ~np.isnan(wins)).any():
            interval = bootstrap_interval(wins[judged], seed=self.config.seed, resamples=1000)
            point |= {"win_low": interval.low, "win_high": interval.high}
        self.curve.append({"queries": self.queries} | point | self.so_far())
        self._log("eval", point | beliefs | settled | self.so_far())

    def _sample(self) -> None:
        """Writes a few duels of the last round for people to read."""
        if ranks.rank() == 0:
            duels, info = self.played
            for sample in samples(self.core.task, duels, info, round=int(self.core.round), queries=self.queries):
                self.samples.append(rounded(dataclasses.asdict(sample)))

    def agreed(self, stop: bool) -> bool:
        """Whether any rank was asked to stop."""
        return ranks.any_of(stop)

    def save_if_due(self) -> None:
        """Saves where the last checkpoint is old enough, on any rank's clock."""
        if ranks.any_of(time.monotonic() - self.saved_at >= self.config.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Replaces the checkpoint by the present state."""
        with self._clock("checkpoint"):
            if ranks.rank() == 0:
                self.metrics.sync()
                self.samples.sync()
                self.folder.save(self._write_state)
            else:  # what is the same on all ranks is written into a folder that nobody keeps
                with tempfile.TemporaryDirectory() as folder:
                    self.agent.save(Path(folder) / "agent")
            ranks.meet()
        self.saved_at = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Saves, writes the result, and returns it."""
        self.save()
        self._log("end", {})
        if ranks.rank() == 0:
            write_json(self.folder.result, outcome(self), indent=None)
        ranks.meet()
        return read_json(self.folder.result)

    def _write_state(self, folder: Path) -> None:
        self.agent.save(folder / "agent")
        state = {
            "env": self.core.state_dict(),
            "metrics_bytes": self.metrics.bytes,
            "samples_bytes": self.samples.bytes,
            "time": dict(self.time),
            "logged": self.logged,
            "env_seconds": self.core.seconds,
            "seconds": self.seconds(),
            "sums": dict(self.sums),
            "curve": self.curve,
            "beliefs": self.examiner.points,
            "marks": self.marks,
            "bought": self.bought,
            "truncated": self.truncated,
        }
        write_json(folder / "state.json", state, indent=None)

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        self.agent.load(folder / "agent")
        self.core.load_state_dict(state["env"])
        self.observation = self.core.observe()
        self.time.update(state["time"])
        self.core.seconds.update(state.get("env_seconds", {}))  # checkpoints of earlier versions keep none
        # JSON says NaN as null.
        self.sums.update({name: float("nan") if value is None else value for name, value in state["sums"].items()})
        self.curve, self.marks = state["curve"], state["marks"]
        self.examiner.points = state.get("beliefs", [])  # checkpoints of earlier versions keep none
        self.bought = state.get("bought", [])  # checkpoints of earlier versions keep none
        self.truncated = state["truncated"]
        self.begun -= state["seconds"]
        self.logged = state.get("logged", self.all_seconds())  # checkpoints of earlier versions keep none

    def _round_metrics(self, duels: Duels, info: dict[str, Any], learnt: Metrics) -> Metrics:
        shown = ~np.isnan(info["preference"])
        found: Metrics = {
            "shown": int(shown.sum()),
            "charged": int(info["charged"].sum()),
            "ties": int(info["tie"].sum()),
        }
        found["synthetic"] = int((~np.isnan(duels.synthetic) & ~shown).sum())
        for name, values in info.items():
            if name.startswith("metrics/") and shown.any():
                found[name.removeprefix("metrics/")] = known_mean(np.asarray(values)[shown])
        found |= {name: float(values[0]) for name, values in info.items() if name.startswith("oracle/")}
        wins = np.asarray(info["metrics/online_win_rate"])
        self.sums["shown"] += int((~np.isnan(wins)).sum())
        self.sums["online_win_rate"] += float(np.nansum(wins))
        self.sums["regret"] += float(np.sum(np.asarray(info["metrics/regret"])[shown]))
        self.sums["gradient_steps"] += learnt.get("gradient_steps", 0)
        for name, count in label_counts(info).items():
            self.sums[f"labels/{name}"] += count
        evaluations = 0
        if "reward" in self.agent.needs:  # the oracle judged both responses of every pair shown against the reference
            evaluations += 2 * int(shown.sum())
        if "scores" in self.agent.needs:
            evaluations += int(np.sum(info["evaluations"]))
        self.sums["evaluations"] += evaluations
        if TOLD_MORE & set(self.agent.needs):
            found["evaluations"] = evaluations
        return found | {f"agent/{name}": float(value) for name, value in learnt.items()} | self.so_far()

    def so_far(self) -> Metrics:
        """The mean online win rate and the regret of all duels until now."""
        wins = self.sums["online_win_rate"] / self.sums["shown"] if self.sums["shown"] else float("nan")
        return {"mean_online_win_rate": wins, "cumulative_regret": self.sums["regret"]}

    def _log(self, kind: str, scalars: Metrics) -> None:
        """Writes scalars, and with them the seconds spent since the last were written."""
        now = self.all_seconds()
        spent = {f"time/{name}": seconds - self.logged.get(name, 0.0) for name, seconds in now.items()}
        self.logged = now
        if ranks.rank() > 0:
            return
        scalars = scalars | {name: seconds for name, seconds in spent.items() if seconds > 0}
        self.metrics.append({"kind": kind, "round": int(self.core.round), "queries": self.queries} | scalars)
        # One event for all of them: add_scalar would wake TensorBoard's thread for each, in the midst of a short round.
        values = [
            Summary.Value(tag=name if "/" in name else f"{kind}/{name}", simple_value=value)
            for name, value in scalars.items()
            if np.isfinite(value)
        ]
        writer = self.tensorboard.file_writer
        assert writer is not None  # until it is closed
        writer.add_summary(Summary(value=values), self.queries)

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.time[name] += time.perf_counter() - begun

    def seconds(self) -> float:
        """How long the run has taken, all its sittings together."""
        return time.monotonic() - self.begun

    def all_seconds(self) -> dict[str, float]:
        """Seconds by kind of work, and by stage inside the policy, the agent and the environment's step."""
        found = dict(self.time)
        for owner, stages in (
            ("policy", getattr(self.agent.policy, "seconds", {})),
            ("agent", self.agent.clock.seconds),
            ("env", self.core.seconds),
        ):
            found |= {f"{owner}/{name}": seconds for name, seconds in stages.items()}
        return found

    def _generated_tokens(self) -> int:
        """Tokens that the policy has sampled, evaluations by `respond` included; 0 on finite tasks."""
        return getattr(self.agent.policy, "generated_tokens", 0)


def within_budget(duels: Duels, remaining: int) -> Duels:
    """The duels with at most `remaining` paid queries: those beyond abstain. An identical pair is never paid for.

    Args:
        duels: M duels.
        remaining: queries left, at least 0.
    """
    first, second = duels.pair.responses.T
    paid = duels.query & np.asarray(first != second, bool)
    query = duels.query & ~(paid & (np.cumsum(paid) > remaining))
    return duels if (query == duels.query).all() else dataclasses.replace(duels, query=query)


def changed_versions(folder: RunFolder) -> list[str]:
    """What differs between now and when the run began, as lines to warn with."""
    path = folder.path / "versions.json"
    was = read_json(path) if path.exists() else {}
    now = versions()
    names = [name for name in now if name in was and was[name] != now[name]]
    return [f"warning: {name} was {was[name]} when the run began, and is {now[name]}" for name in names]
