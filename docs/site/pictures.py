"""Draws the pictures of the documentation: ``python docs/site/pictures.py`` writes docs/images/*.svg.

What looks computed is: the choice of duels comes from the package's selection rules, the label curves from its formula.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parent))
from shapes import arrow, box, card, curve, dot, picture, ring, text

from llm_duel_env.agents.selection import most_uncertain_rival, second_thompson, thompson, widest_variance_pair
from llm_duel_env.randomness import generator

IMAGES = Path(__file__).resolve().parents[1] / "images"
MEMBERS, CANDIDATES = 10, 7
MEANS = (0.9, 2.6, 0.2, 2.2, 1.4, 2.0, -0.4)
SPREADS = (0.25, 0.45, 0.3, 0.4, 0.35, 1.15, 1.35)


def loop() -> str:
    """One round: prompt, candidates, duel, label, lesson."""
    shapes = [
        box(16, 40, 150, 96, "Environment", ["shows a prompt", "of the task"]),
        box(222, 40, 150, 96, "Policy", ["samples N candidate", "responses to it"]),
        box(428, 40, 150, 96, "Selection rule", ["says which two duel,", "or abstains"]),
        box(634, 40, 150, 96, "Oracle", ["prefers one of them;", "a label costs 1 query"]),
        arrow((166, 88), (220, 88)),
        arrow((372, 88), (426, 88)),
        arrow((578, 88), (632, 88)),
        arrow((709, 136), (709, 214), (666, 214)),
        box(474, 178, 190, 72, "Ledger", ["the label, on the disk"]),
        arrow((474, 214), (374, 214)),
        box(182, 178, 190, 72, "Learning", ["reward model, then policy"]),
        arrow((297, 178), (297, 138)),
        text(716, 180, "preference", "soft small"),
        text(424, 206, "update", "soft small", "middle"),
        arrow((182, 214), (91, 214), (91, 138)),
        text(136, 206, "next round", "soft small", "middle"),
        text(225, 24, "the agent's", "soft small"),
        curve([(222, 30), (578, 30)], "sa", 2.5),
        text(
            400,
            282,
            "Until the budget of queries is spent. How good the policy is, is measured beside the loop.",
            "soft",
            "middle",
        ),
    ]
    return picture(800, 300, "One round of the contextual dueling bandit", shapes)


def choice() -> str:
    """Which two of seven candidates duel, by four rules, from the same ten opinions."""
    draw = generator(7, "picture", "opinions")
    noise = draw.standard_normal((MEMBERS, 1, CANDIDATES))
    rewards = torch.tensor(np.array(MEANS) + np.array(SPREADS) * noise)
    identity = torch.arange(CANDIDATES)[None]
    half = torch.full((1,), 0.5)
    first = thompson(rewards, torch.tensor([3]))
    same = identity == first[:, None]
    orders = torch.tensor(generator(7, "picture", "order").permutation(MEMBERS)[None])
    pairs = {
        "Two samples (online DPO)": (0, 1),
        "Explore and exploit: two winners": (first.item(), second_thompson(rewards, first, orders, same, half).item()),
        "Best arm: a winner, and the rival in doubt": (
            first.item(),
            most_uncertain_rival(rewards, first, same, half).item(),
        ),
        "Uncertainty: the pair most in doubt": tuple(
            int(side) for side in widest_variance_pair(rewards, identity, half)
        ),
    }
    shapes = []
    for number, (name, pair) in enumerate(pairs.items()):
        left, top = 10 + 395 * (number % 2), 10 + 250 * (number // 2)
        shapes += [card(left, top, 380, 235), text(left + 16, top + 26, name, "ink head")]
        shapes += _panel(rewards[:, 0].numpy(), pair, left, top)
    shapes.append(
        text(400, 532, "Dots: what each of ten members of the ensemble thinks a response is worth.", "soft", "middle")
    )
    return picture(800, 545, "Four rules choose two of seven candidates for a duel", shapes)


def _panel(rewards: np.ndarray, pair: tuple[int, ...], left: float, top: float) -> list[str]:
    low, high = rewards.min(), rewards.max()

    def at(candidate: int, reward: float) -> tuple[float, float]:
        return left + 44 + 49 * candidate, top + 190 - 135 * (reward - low) / (high - low)

    shapes = []
    for candidate in range(CANDIDATES):
        chosen = candidate in pair
        look = "dot" if not chosen else "a" if candidate == pair[0] else "b"
        points = [at(candidate, reward) for reward in rewards[:, candidate]]
        shapes += [dot(x, y, 4, look) for x, y in points]
        if chosen:
            ys = [y for _, y in points]
            middle, reach = (min(ys) + max(ys)) / 2, max(ys) - min(ys) + 20
            shapes.append(ring(points[0][0], middle, 24, reach, "sa" if candidate == pair[0] else "sb"))
        shapes.append(text(points[0][0], top + 224, str(candidate + 1), "ink head" if chosen else "soft", "middle"))
    return shapes


def feedback() -> str:
    """How often the first response gets the label, by how much better it is."""
    left, top, width, height = 70, 30, 420, 220
    gaps = np.linspace(-4, 4, 81)

    def at(gap: float, share: float) -> tuple[float, float]:
        return left + width * (gap + 4) / 8, top + height * (1 - share)

    step = [(-4, 0), (0, 0), (0, 1), (4, 1)]
    flipped = [(-4, 0.1), (0, 0.1), (0, 0.9), (4, 0.9)]
    shapes = [
        card(left, top, width, height),
        curve([at(gap, 0.5) for gap in (-4, 4)], "line", 0.8, "3 4"),
        curve([at(0, share) for share in (0, 1)], "line", 0.8, "3 4"),
        curve([at(*point) for point in step], "sb"),
        curve([at(*point) for point in flipped], "sc", 2.2, "6 4"),
        curve([at(gap, share) for gap, share in zip(gaps, expit(gaps))], "sa", 2.8),
        *(text(left - 10, at(0, share)[1] + 5, f"{share:g}", "soft small", "end") for share in (0, 0.5, 1)),
        *(
            text(at(gap, 0)[0], top + height + 20, f"{gap:+d}" if gap else "0", "soft small", "middle")
            for gap in (-4, -2, 0, 2, 4)
        ),
        text(
            left + width / 2,
            top + height + 44,
            "utility of the first less that of the second (logits)",
            "soft",
            "middle",
        ),
        text(left - 44, top - 10, "P(label says the first)", "soft small"),
        curve([(520, 80), (550, 80)], "sa", 2.8),
        text(560, 85, "Bernoulli"),
        text(560, 103, "wins with its probability", "soft small"),
        curve([(520, 140), (550, 140)], "sb"),
        text(560, 145, "threshold"),
        text(560, 163, "the better one always wins", "soft small"),
        curve([(520, 200), (550, 200)], "sc", 2.2, "6 4"),
        text(560, 205, "threshold, flip_rate 0.1"),
        text(560, 223, "one label in ten is wrong", "soft small"),
    ]
    return picture(760, 310, "How a probability becomes a label", shapes)


def counting() -> str:
    """What is counted in a run: every duel shown, and the deployed policy."""
    shapes = [
        text(16, 50, "Online", "a head"),
        text(16, 70, "every duel shown", "soft small"),
        text(16, 88, "counts", "soft small"),
        text(16, 190, "Offline", "b head"),
        text(16, 210, "the policy that would", "soft small"),
        text(16, 228, "be deployed counts", "soft small"),
    ]
    for step in range(7):
        x = 170 + 88 * step
        shapes += [card(x, 40, 66, 50), dot(x + 22, 65, 9, "a"), dot(x + 44, 65, 9, "a")]
        if step < 6:
            shapes.append(arrow((x + 67, 65), (x + 87, 65)))
        if step % 3 == 0:
            shapes += [arrow((x + 33, 130), (x + 33, 178)), card(x, 180, 66, 50), dot(x + 33, 205, 10, "b")]
    shapes += [
        text(170, 116, "online win rate, cumulative regret: explore and exploit (E&E)"),
        text(170, 258, "offline win rate, simple regret, queries to target: best-arm identification (BAI)"),
        text(170, 278, "on held-out prompts; no label is bought for it", "soft small"),
    ]
    return picture(800, 294, "What counts online, and what counts offline", shapes)


def favicon() -> str:
    """Two responses face each other."""
    shapes = [dot(11, 16, 8, "a"), dot(21, 16, 8, "b")]
    return picture(32, 32, "Two responses", shapes)


PICTURES = {"loop": loop, "choice": choice, "feedback": feedback, "counting": counting, "favicon": favicon}
"""File name -> what draws it."""


def main() -> None:
    """Writes all pictures."""
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw())
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
