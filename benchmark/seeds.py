"""What many seeds of a finite task in one batched computation would save. `make bench-seeds`.

Arithmetic that several seeds could share a kernel for is timed both ways, one seed after the other and all in one batch
(`torch.func.vmap` over stacked weights), on one thread as in a sweep: the policy's scores of a round's candidates, a
step of its learning, a step of the ensemble. Beside it where the time of a round goes, from rounds that are played.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from speed import alternate
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from llm_duel_env.agents.policies.candidate import CandidateScorer
from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.session import Session
from llm_duel_env.randomness import torch_generator
from llm_duel_env.tasks import make_task

BATCH, WARM = 64, 20
"""Prompts of a round, and rounds before any is timed: the ensemble waits for labels."""


def policy_times(seeds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of scoring a round's candidates, and of the gradient of DPO's loss on its pairs, for all seeds."""
    task = make_task("synthetic")
    shape, wide = (task.view().observation_space[name].shape for name in ("context", "candidates"))
    scorers = [CandidateScorer(shape[0], wide[1], torch_generator(seed, "bench")) for seed in range(seeds)]
    for scorer in scorers:
        torch.nn.init.normal_(scorer.out)
    draw = torch_generator(0, "inputs")
    context = torch.randn(seeds, BATCH, shape[0], generator=draw)
    candidates = torch.randn(seeds, BATCH, *wide, generator=draw)
    pair = torch.randint(0, wide[0], (seeds, BATCH, 2), generator=draw)
    weights, buffers = stack_module_state(scorers)

    def scores(own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, a: Tensor) -> Tensor:
        return functional_call(scorers[0], (own, rest), (x, a)).log_softmax(dim=1)

    def loss(own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, a: Tensor, chosen: Tensor) -> Tensor:
        won, lost = scores(own, rest, x, a).gather(1, chosen).unbind(1)
        return -torch.nn.functional.logsigmoid(0.1 * (won - lost)).mean()

    def one_by_one_gradient() -> None:
        for seed, scorer in enumerate(scorers):
            scorer.zero_grad(set_to_none=True)
            won, lost = scorer(context[seed], candidates[seed]).log_softmax(1).gather(1, pair[seed]).unbind(1)
            (-torch.nn.functional.logsigmoid(0.1 * (won - lost)).mean()).backward()

    @torch.no_grad()
    def one_by_one_scores() -> None:
        for seed, scorer in enumerate(scorers):
            scorer(context[seed], candidates[seed]).log_softmax(1)

    with torch.no_grad():
        batched = vmap(scores)(weights, buffers, context, candidates)
        single = torch.stack([s(context[i], candidates[i]).log_softmax(1) for i, s in enumerate(scorers)])
        torch.testing.assert_close(batched, single)
    return {
        "policy: scores": alternate(
            repeats,
            alone=one_by_one_scores,
            batched=torch.no_grad()(lambda: vmap(scores)(weights, buffers, context, candidates)),
        ),
        "policy: gradient": alternate(
            repeats,
            alone=one_by_one_gradient,
            batched=lambda: vmap(grad(loss))(weights, buffers, context, candidates, pair),
        ),
    }


def ensemble_times(seeds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of the gradient of the ensemble's objective on a minibatch, for all seeds."""
    task = make_task("synthetic")
    shape, wide = (task.view().observation_space[name].shape for name in ("context", "candidates"))
    size = CandidateScorer(shape[0], wide[1], torch_generator(0, "bench")).feature_size
    config = EnsembleConfig()
    models = [EnsembleRewardModel(size, config, seed=seed) for seed in range(seeds)]
    pairs = torch.randn(seeds, config.batch, 2, size, generator=torch_generator(0, "pairs"))
    weights = {name: torch.stack([m.weights[name].detach() for m in models]) for name in models[0].weights}
    anchors = {name: value.clone() for name, value in weights.items()}

    def objective(own: dict[str, Tensor], start: dict[str, Tensor], x: Tensor) -> Tensor:
        e = config.members
        first = torch.baddbmm(own["b1"], x.reshape(-1, size).expand(e, -1, -1), own["w1"]).relu()
        second = torch.baddbmm(own["b2"], first, own["w2"]).relu()
        rewards = torch.baddbmm(own["b3"], second, own["w3"]).view(e, *x.shape[:-1])
        nll = torch.nn.functional.softplus(rewards[:, :, 1] - rewards[:, :, 0]).mean(dim=1).sum()
        return nll + config.anchor / 1000 * sum((own[name] - start[name]).square().sum() for name in own)

    def one_by_one() -> None:
        for model, own in zip(models, pairs):
            model.optimizer.zero_grad(set_to_none=True)
            model.objective(own, 1000).sum().backward()

    both = [model.objective(own, 1000).sum() for model, own in zip(models, pairs)]
    torch.testing.assert_close(vmap(objective)(weights, anchors, pairs), torch.stack(both))
    return {
        "ensemble: gradient": alternate(
            repeats, alone=one_by_one, batched=lambda: vmap(grad(objective))(weights, anchors, pairs)
        )
    }


def round_times(agent: str, rounds: int) -> dict[str, float]:
    """Seconds a round of one seed as a sweep plays it, by kind of work."""
    with tempfile.TemporaryDirectory() as out:
        config = RunConfig(agent, "duel/Synthetic-v0", budget=10_000, batch=BATCH, folder=str(Path(out) / "run"))
        folder = RunFolder(config.folder)
        folder.path.mkdir(parents=True)
        with Session(config, folder) as session:
            session.start()
            for _ in range(WARM):
                session.play_round()
            before, begun = dict(session.time), time.perf_counter()
            for _ in range(rounds):
                session.play_round()
                session.evaluate_if_due()
            whole = (time.perf_counter() - begun) / rounds
            spent = {name: (value - before.get(name, 0.0)) / rounds for name, value in session.time.items()}
    named = {name: spent.get(name, 0.0) for name in ("act", "step", "update", "evaluate")}
    return {"whole": whole, **named, "rest": whole - sum(named.values())}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds computed together (default 10)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each side (default 15)")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds of each agent (default 40)")
    told = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, 1 thread, {told.seeds} seeds, {BATCH} prompts a round; medians of {told.repeats}"
    )
    print(f"{'milliseconds a seed':<24}{'alone':>10}{'batched':>10}{'times faster':>14}")
    for name, took in (policy_times(told.seeds, told.repeats) | ensemble_times(told.seeds, told.repeats)).items():
        each = [1e3 * took[side] / told.seeds for side in ("alone", "batched")]
        print(f"{name:<24}{each[0]:>10.2f}{each[1]:>10.2f}{each[0] / each[1]:>14.2f}", flush=True)
    print("\nmilliseconds a round, one seed alone")
    for agent in ("online_dpo", "sea"):
        spent = round_times(agent, told.rounds)
        print(f"{agent:<12}" + "  ".join(f"{name} {1e3 * value:.1f}" for name, value in spent.items()), flush=True)


if __name__ == "__main__":
    main()
