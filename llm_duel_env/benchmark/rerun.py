"""Plays the first rounds of finished runs again, from seed and settings, and compares them with what the runs hold.

What can be compared: every label in the ledger of those rounds (prompt, both responses, label), every evaluation on the
learning curve until then, and, where a run is played to its end, the figures that stand beside its curve. A run kept
without its ledger is compared by its curve and those figures alone.

On one machine, with as many threads, all must be identical. On another machine sums of floats may round otherwise, and
once one sampled response or one choice differs, everything after it does: so it is told how far the two agree, and
where they part.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.audit import ledger_records
from llm_duel_env.benchmark.origin import source_of
from llm_duel_env.benchmark.outcome import LENGTH_CONTROLLED, outcome
from llm_duel_env.benchmark.replays import Replay, compare_labels
from llm_duel_env.benchmark.results import Result
from llm_duel_env.benchmark.run_config import RunConfig, env_spec
from llm_duel_env.benchmark.run_folder import RunFolder, finite, read_json, rounded
from llm_duel_env.extras import MissingExtraError
from llm_duel_env.ledger import Record
from llm_duel_env.quiet import no_progress_bars
from llm_duel_env.randomness import generator

if TYPE_CHECKING:
    from llm_duel_env.benchmark.session import Session

ROUNDS = 20
"""Rounds that are played again where nobody says how many."""
AT_END = (
    *("kind", "feedback", "eval_prompts", "queries", "rounds", "status", "online_win_rate", "cumulative_regret"),
    *(LENGTH_CONTROLLED, "gradient_steps", "generated_tokens", "evaluations", "labels", "beliefs"),
)
"""Figures of a result that a replay to the end gives too; earlier versions wrote fewer. Time depends on the machine."""
OURS = ("synthetic", "tiny_tldr", "pool")
"""Tasks that a run from somebody else is played on again: they ask no server, no person and no hub for anything."""


class CannotReplay(ValueError):  # noqa: N818  says what is so
    """A run cannot be played again here; says why."""


def rounds_of(option: str, told: Sequence[int]) -> int:
    """How many rounds an option with an optional number asks for.

    Raises:
        ValueError: more than one number.
    """
    if len(told) > 1:
        raise ValueError(f"{option}: expected one number of rounds or none, got {list(told)}")
    return told[0] if told else ROUNDS


def check(results: Sequence[Result], rounds: int, say: Callable[[str], None] = print) -> None:
    """Plays rounds of one seed of every entry again, for whoever is about to hand them on.

    Raises:
        ValueError: an entry came out differently, or could not be replayed; says which.
    """
    said: list[str] = []
    seen = rerun(results, rounds, say=said.append)
    for line in said:
        say(line)
    good = sum("replay" in result and result["replay"]["equal"] for result in seen)
    if good < len(said):
        raise ValueError(
            f"check: expected all {len(said)} entries to come out the same, got {good}; nothing is written"
        )


def rerun(
    results: Sequence[Result], rounds: int = ROUNDS, seeds: int = 1, say: Callable[[str], None] = print
) -> list[Result]:
    """Plays rounds of every entry again.

    Args:
        results: of finished runs, as `find_results` gives them.
        rounds: how many of each run, at least 1; all of it where it has fewer.
        seeds: how many runs of each entry, drawn by what the entry holds; 0 takes all.
        say: takes a line about each run.

    Returns:
        The results, with "replay" (see `Replay`) on those that were played again.

    Raises:
        ValueError: `rounds` or `seeds` is out of range.
    """
    if rounds < 1 or seeds < 0:
        raise ValueError(f"rerun: expected at least 1 round, and 0 seeds (all) or more, got {rounds} and {seeds}")
    entries: dict[str, list[int]] = defaultdict(list)
    for number, result in enumerate(results):
        names = ("env", "env_kwargs", "label", "overrides", "budget", "batch")
        entries[json.dumps([result[name] for name in names], sort_keys=True)].append(number)
    found = list(results)
    for key, numbers in entries.items():
        # Not the same seeds of every entry, nor such as are known before the entry is made.
        held = [str(results[number].get("ledger_sha256", "")) for number in numbers]
        order = generator(0, "rerun", key, *held).permutation(len(numbers))
        for number in sorted(numbers[i] for i in order[: seeds or len(numbers)]):
            result = results[number]
            name = f"{result['label']}, seed {result['seed']} on {result['env']}"
            try:
                seen = replay(result, rounds)
            except CannotReplay as reason:
                say(f"{name}: cannot be replayed: {reason}")
                continue
            found[number] = {**result, "replay": seen.as_found()}
            say(f"{name}: {seen}{_suspects(result) if seen.difference else ''}")
    return found


def replay(result: Result, rounds: int) -> Replay:
    """Plays the first `rounds` rounds of a run again, in a folder that is thrown away.

    Raises:
        CannotReplay: the agent is not installed, the task is made of something else here, its labels cost money or
            somebody's time, or something the run needs is missing.
    """
    config = config_of(result)
    held = _held_labels(result)
    with tempfile.TemporaryDirectory(prefix="llm-duel-rerun-") as folder, no_progress_bars(), _threads(result):
        config = dataclasses.replace(config, folder=folder)
        try:
            from llm_duel_env.benchmark.session import Session

            with Session(config, RunFolder(folder)) as session:
                _check_task(session, result)
                seen = _play(session, result, rounds)
            mine = ledger_records(folder, (Path(folder) / "ledger.jsonl").read_bytes())[1]
        except CannotReplay:
            raise
        except (ValueError, OSError, RuntimeError, ArithmeticError, TypeError, MissingExtraError) as error:
            raise CannotReplay(f"{type(error).__name__}: {error}") from error
    if held is not None:
        return compare_labels(seen, held, mine)
    if seen.evaluations < 2:  # the first comes before any label
        raise CannotReplay(f"it is kept without its ledger, and was not evaluated in its first {rounds} rounds")
    return dataclasses.replace(seen, rounds=0)


def config_of(result: Result) -> RunConfig:
    """The configuration of a run by its result; its folder is empty.

    Raises:
        CannotReplay: it cannot be played here, or should not be by somebody else.
    """
    agent = result["agent"]
    if registry.in_file(agent) and "archive" in result:
        raise CannotReplay(f"agent {agent} is a file of its author's; to be replayed it must be an installed package")
    if not registry.in_file(agent) and agent not in registry.list_agents():
        raise CannotReplay(f"agent {agent} is not installed")
    names = ("agent", "env", "seed", "budget", "batch", "overrides", "env_kwargs", "label", "eval_prompts")
    try:
        config = RunConfig(folder="", **{name: result[name] for name in names})
        spec = env_spec(config.env)
        agent_class = registry.load_agent(agent)
        agent_class.configure(config.overrides)
    except (ValueError, KeyError, ImportError) as error:
        raise CannotReplay(f"{type(error).__name__}: {error}") from error
    claimed, known = (
        (result["provenance"], sorted(result["needs"])),
        (agent_class.provenance, sorted(agent_class.needs)),
    )
    if claimed != known:
        raise CannotReplay(f"agent {agent} as it is installed here says {known} of itself, and the entry {claimed}")
    if "archive" in result:
        _check_stranger(config, config.env_kwargs.get("task", spec.kwargs["task"]))
    return config


def _check_stranger(config: RunConfig, task: str) -> None:
    """What somebody else's settings must not do here: ask servers, load models by name, read files."""
    if task not in OURS:
        raise CannotReplay(f"task {task} names models and data of its author's; play {', '.join(OURS)}")
    for name, allowed in (("policy.encoder", ("policy", "task")), ("policy.deepspeed_config", (None,))):
        if config.overrides.get(name, allowed[0]) not in allowed:
            raise CannotReplay(f"{name} names a file or a model of its author's: {config.overrides[name]!r}")


def _check_task(session: Session, result: Result) -> None:
    if session.core.task.oracle.metered:
        raise CannotReplay("its labels cost money or somebody's time")
    if (was := result.get("fingerprint")) not in (None, session.fingerprint):
        told = f"fingerprint {was[:12]}, here {session.fingerprint[:12]}"
        raise CannotReplay(f"its task is made of other weights or data than here ({told})")


def _play(session: Session, result: Result, rounds: int) -> Replay:
    """Plays, and evaluates where the run did; the evaluations compared, and at the run's end its other figures."""
    curve = result["curve"]
    points = list(curve["queries"])
    examined = set((result.get("beliefs") or {}).get("queries", ()))  # not all of them are on a thinned curve
    session.start()
    at, equal, difference = 1, 0, ""
    problem = _evaluation_difference(session, curve, 0)
    equal, difference = equal + (not problem), difference or problem
    while session.core.round < rounds and not session.over:
        session.play_round()
        final = at == len(points) - 1
        if at < len(points) and points[at] == session.queries and (session.over or not final):
            session.evaluate()
            problem = _evaluation_difference(session, curve, at)
            at, equal, difference = at + 1, equal + (not problem), difference or problem
        elif at < len(points) and session.queries > points[at]:
            difference = difference or f"there is an evaluation after {points[at]} queries, here no round ends there"
            break
        elif session.queries in examined and session.queries > session.curve[-1]["queries"]:
            session.evaluate()
    if session.over and not difference:
        difference = _end_difference(session, result)
    played = int(session.core.round)
    return Replay(rounds=played, evaluations=at, evaluations_equal=equal, difference=difference)


def _evaluation_difference(session: Session, curve: dict[str, list[Any]], at: int) -> str:
    """Which figures of the last evaluation are others than those of the curve's point `at`; empty where none is."""
    mine = finite(rounded(session.curve[-1]))
    differing = [name for name, values in curve.items() if mine.get(name) != values[at]]
    if not differing:
        return ""
    first, told = differing[0], f"{len(differing)} of {len(curve)} figures differ: {', '.join(differing)}"
    was = f"{first} was {curve[first][at]}, here {mine.get(first)}"
    return f"evaluation after {curve['queries'][at]} queries: {was} ({told})"


def _end_difference(session: Session, result: Result) -> str:
    """Which figures of a run's end are others than those of its result; empty where none is."""
    mine = outcome(session)
    differing = [name for name in AT_END if name in result and result[name] != mine[name]]
    if not differing:
        return ""
    was, here = (str(one[differing[0]])[:200] for one in (result, mine))
    return f"at the end: {differing[0]} was {was}, here {here} ({len(differing)} differ: {', '.join(differing)})"


def _held_labels(result: Result) -> list[Record] | None:
    """The records of a run's ledger; None where it is kept without.

    Raises:
        CannotReplay: the ledger is damaged, or not the one that the result speaks of.
    """
    try:
        if "archive" in result:
            from llm_duel_env.benchmark.submission import ledger_of

            content = ledger_of(result)
        elif (path := Path(result["folder"]) / "ledger.jsonl").is_file():
            content = path.read_bytes()
        else:
            return None
        if sha256(content).hexdigest() != result["ledger_sha256"]:
            raise CannotReplay(f"{result['folder']}: its ledger is not the one that its result speaks of")
        return ledger_records(str(result["folder"]), content)[1]
    except CannotReplay:
        raise
    except (ValueError, OSError) as error:
        raise CannotReplay(str(error)) from error


@contextmanager
def _threads(result: Result) -> Iterator[None]:
    """Within the block torch works with as many threads as the run had, where that is known: sums depend on it."""
    import torch

    was = _versions(result)
    told = str(was.get("threads") or was.get("OMP_NUM_THREADS"))
    before = torch.get_num_threads()
    torch.set_num_threads(int(told) if told.isdecimal() and 1 <= int(told) <= 1024 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions(result: Result) -> dict[str, Any]:
    """What the run was played on; results of earlier versions have it beside them alone."""
    path = Path(result["folder"]) / "versions.json"
    found = result.get("versions") or (read_json(path) if path.is_file() else {})
    return found if isinstance(found, dict) else {}


def _suspects(result: Result) -> str:
    """What may explain a difference: packages, code and machine that were others then."""
    from llm_duel_env.benchmark.machine import versions

    was, now = _versions(result), versions()
    names = [name for name in now if name in was and was[name] != now[name] and name != "memory_gb"]
    source = (result.get("agent_source") or {}).get("sha256")
    if source and source != source_of(result["agent"], registry.load_agent(result["agent"])).get("sha256"):
        names.append("the agent's file")
    return f" (other than then: {', '.join(names)})" if names else ""
