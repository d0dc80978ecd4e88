"""What every metric that an agent logs means: the one place where it is said."""

from __future__ import annotations

METRICS: dict[str, str] = {
    # Policies, at every update.
    "loss": "The direct optimizer's loss, with all terms that the agent adds; the mean over the update's pairs.",
    "grad_norm": "Norm of the policy's gradient before clipping, the mean over the update's optimizer steps.",
    "learning_rate": "Learning rate of the update, as the warm-up and the cosine over the query budget have it.",
    "gradient_steps": "Optimizer steps that the update took; a result holds their sum over the run.",
    "pairs": "Rows (pairs, or rankings) that the update trained on; ties and unlabelled duels are left out.",
    # Policies, at every evaluation.
    "kl": "Kullback-Leibler divergence of the policy from its reference, in nats, on held-out prompts.",
    "entropy": "Entropy of the policy's responses, in nats, on held-out prompts.",
    "length": "Tokens in a sampled response, on held-out prompts (tasks of text only).",
    # Losses.
    "margin": "h, by how much the winner's log-ratio to the reference exceeds the loser's, without beta (losses "
    "without a reference: of log-probabilities per token); as it was before each step, the mean over pairs.",
    "accuracy": "Share of pairs whose winner that margin puts first.",
    "sft_loss": "The supervised term on the best response, without its weight.",
    "tau": "Ada-DPO's scale, the mean over pairs: small for ambiguous pairs, at its bound for clear ones.",
    "weight": "OPTune's weight of a pair, sigmoid(beta2 times the reward gap), the mean over pairs.",
    "zero_weight": "Share of pairs that weigh nothing, their scores being equal or against the label.",
    "self_reward_margin": "DLMA's self-reward of the winner less that of the loser, clipped: the margin asked for.",
    "ranking_loss": "PRO's list-wise term, without the supervised one.",
    "token_weight": "BMC's weight of a token, the mean over the tokens of a pair; 1 is plain DPO.",
    "differing": "Share of a pair's tokens in which its two responses differ.",
    "lost_log_ratio": "How far the winner's log-probability has fallen below the reference's, 0 where it has not.",
    "bonus": "Log-probability of the bonus response (SELM, VPO: less the reference's), without the term's weight.",
    "bonus_rows": "Share of rows that have a bonus response.",
    "preference": "Share of duels that the policy's sample won against the mixture's.",
    "log_ratio": "Mean of log pi - log ref of the policy's samples: an estimate of the KL.",
    "level_loss": "SPO's cross-entropy of the level to which a response was degraded, in nats (chance: log 5).",
    "level_accuracy": "Share of degraded responses whose level is told right (chance: 0.2).",
    # The epistemic reward model.
    "erm/loss": "Objective of a member, the pull to its start included; the mean over members and the round's steps.",
    "erm/accuracy": "Share of the round's new duels whose winner a member puts first, the mean over members, before it "
    "has learnt from them.",
    "erm/accuracy_of_mean": "The same of the members' mean reward.",
    "erm/std": "Spread of opinions on the round's duels: the standard deviation, over members, of the reward "
    "difference, before they have learnt from them. It is what exploration lives on.",
    "erm/distance": "How far the members have moved from their random starts.",
    "erm/stored": "Duels in the ensemble's buffer: those that the oracle labelled.",
    "erm/steps": "Gradient steps of the ensemble so far.",
    # Agents.
    "synthetic_share": "Share of the round's prompts that the ensemble labelled (as released: those that the release "
    "does not count).",
    "clash_rate": "Share of prompts whose two chosen responses are the same text.",
    "claimed_queries": "Queries so far as the released code would count them: without its model data.",
    "asked": "Share of the round's prompts that the oracle was asked about.",
    "samples": "Responses sampled per prompt in the round.",
    "implicit_margin": "Mean size of the implicit reward's difference in the round's pairs.",
    "entropy_of_prompts": "Estimated entropy of the policy's responses to the round's prompts, in nats.",
    "entropy_of_kept": "The same of the prompts that were kept.",
    "phase": "Acquisition phases behind the agent.",
    "labels": "Decided labels that the policy was retrained on.",
    "cosine": "Mean cosine similarity of the two responses that were chosen.",
    "cosine_of_candidates": "Mean cosine similarity of all pairs of candidates: what choosing is measured against.",
    "greedy_best": "Share of prompts whose greedy response came first of the three.",
    "greedy_worst": "Share of prompts whose greedy response came last of the three.",
    "queries_per_pair": "Queries that the round's rankings cost, per pair that there was to learn from.",
    "reference_version": "How often the reference was moved to the policy.",
    "regenerated_share": "Share of the round's prompts whose pair was generated and labelled anew.",
    "known_prompts": "Prompts that have a labelled pair.",
    "score_gap": "Mean score of the best response of a ranking less that of its worst.",
    "edited": "Share of the round's pairs that the editor could change, which are those trained on.",
    "nll": "Negative log-likelihood of all labels under the linear estimate, in nats per label.",
    "newton_steps": "Newton steps until the linear estimate was exact again.",
    "theta_norm": "Norm of the linear estimate.",
    "reward": "The environment's reward, the mean over the round: the online win rate that the agent learns from.",
}
"""Metric -> what it means. Runs log an update's under ``agent/``, an evaluation's under ``eval/``."""


def explain(name: str) -> str:
    """What a metric means.

    Raises:
        KeyError: nobody has said so yet; says where to.
    """
    if name not in METRICS:
        raise KeyError(f"metric {name!r} has no explanation: add one to {__name__}.METRICS")
    return METRICS[name]
