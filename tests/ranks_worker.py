"""One rank of tests/test_ranks.py: started by the launcher with the name of what it is to do."""

import atexit
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from llm_duel_env import ranks, watch
from llm_duel_env.watch import watched


def together():
    """Every way of telling, on uneven parts."""
    rank, world = ranks.rank(), ranks.world()
    assert world == 3
    for count in (1, 2, 3, 7):
        rows = ranks.share(count)
        # Row i holds i in i + 1 columns, so that the ranks' parts differ in width.
        part = torch.zeros(len(rows), int(rows.max()) + 1, 2, dtype=torch.int64)
        for place, row in enumerate(rows.tolist()):
            part[place, : row + 1] = row
        whole = ranks.gather(part, count)
        assert whole.shape == (count, count, 2)
        for row in range(count):
            assert (whole[row, : row + 1] == row).all()
            assert (whole[row, row + 1 :] == 0).all()
    value = {"a": [1, 2.5, "drei", None, True], "b": np.arange(4).reshape(2, 2), "nan": np.array([np.nan])}
    told = ranks.tell(value if rank == 0 else None)
    assert told["a"] == value["a"]
    np.testing.assert_array_equal(told["b"], value["b"])
    assert told["b"].dtype == np.int64
    np.testing.assert_array_equal(told["nan"], value["nan"])
    assert ranks.tell("x" if rank == 0 else "y") == "x"
    tensors = [torch.full((2,), float(rank)), torch.tensor([rank])]
    ranks.add_up(tensors)
    assert tensors[0].tolist() == [3.0, 3.0]
    assert tensors[1].item() == 3
    weight = torch.full((3,), float(rank + 1), requires_grad=True)
    with torch.no_grad():
        ranks.copy_from_first([weight])
    assert weight.tolist() == [1.0, 1.0, 1.0]
    seen = []
    doubled = ranks.together(lambda rows: (seen.extend(rows), np.array([2.0 * len(row) for row in rows]))[1])
    rows = [[1], [2, 3], [4, 5, 6], [7] * 4]
    if rank == 0:
        assert doubled(rows).tolist() == [2.0, 4.0, 6.0, 8.0]
        assert doubled([]).tolist() == []
        assert doubled(rows[:1]).tolist() == [2.0]
        assert ranks.lead("through") == "through"
        assert seen == [[1], [7] * 4, [1]]
    else:
        assert ranks.follow() == "through"
        assert seen == [rows[rank], [1]]  # its share, and of a single row the same again
    assert doubled(rows).tolist() == [2.0, 4.0, 6.0, 8.0]  # called on all ranks alike
    assert ranks.any_of(rank == 2)
    assert not ranks.any_of(False)
    ranks.check_alike("ones", [torch.ones(2), torch.ones(2, 2).sum(), torch.ones(3, 2).T])
    with pytest.raises(ranks.RanksDiffer, match=r"ranks \[2\]"):
        ranks.check_alike("numbers", [torch.tensor([0.0 if rank < 2 else 1e-9])])
    if rank == 0:
        print("all well", flush=True)


def scores():
    """A reward model's scores of three prompts' one, two and three responses: a prompt's texts come to one rank."""
    from llm_duel_env.oracles.reward_model import RewardModelOracle
    from llm_duel_env.tasks.tiny_tldr import ASSETS

    names = ("vera", "pia", "nora")
    prompts = [f"so i got family trouble : {name} scolded me wednesday ." for name in names]
    texts = [(prompt, f"{name} scolded me") for k, prompt in enumerate(prompts) for name in names[: k + 1]]
    oracle = RewardModelOracle(ASSETS / "reward_model", device="cpu")
    assert oracle.packs
    got = oracle.score(texts)
    assert oracle.rows_scored == (4 if ranks.rank() == 0 else 2)  # a and c, b
    oracle._forward = oracle._forward_here  # this rank alone
    np.testing.assert_allclose(got, oracle.score(texts), rtol=1e-5, atol=1e-5)
    assert len(set(got.round(4))) == 6
    if ranks.rank() == 0:
        print("all well", flush=True)


def fails():
    """Rank 1 breaks while rank 0 waits for it."""
    if ranks.rank() == 1:
        raise ValueError("the egg broke")
    ranks.any_of(False)


def stops():
    """Rank 1 is stopped, as a machine that hangs: nothing is closed, nobody is told."""
    ranks.meet()
    time.sleep(2.5)  # so that it has been seen alive
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.any_of(False)


def ends_at_once():
    """The process ends while gloo's threads are about to let go of the last operations' tensors: Python's lock, which
    they need for that, is not handed over while this thread works."""

    def operations():
        sys.setswitchinterval(1e3)
        for tensor in [torch.ones(300) for _ in range(50)]:
            torch.distributed.all_reduce(tensor)

    atexit.register(operations)  # after everything else


def host_stops():
    """Rank 0, which keeps the ranks' meeting place, is stopped while rank 1 waits for it."""
    ranks.meet()
    time.sleep(5 * watch.BEAT)
    if ranks.rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.any_of(False)


def host_stops_and_the_other_fails():
    """Rank 0, which keeps the ranks' meeting place, is stopped, and rank 1 breaks: whom should it tell?"""
    ranks.meet()
    if ranks.rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(5 * watch.BEAT)
    raise ValueError("the egg broke")


WORKS = [together, scores, fails, stops, ends_at_once, host_stops, host_stops_and_the_other_fails]

if __name__ == "__main__":
    watch.BEAT = float(os.environ.get("TEST_BEAT", watch.BEAT))
    ranks.join("cpu")
    with watched():
        {work.__name__: work for work in WORKS}[sys.argv[1]]()
