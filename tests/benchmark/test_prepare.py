"""`Agent.prepare`: once, before the first round of a fresh run, and not when one is resumed."""

import pytest
from benchmark_helpers import config, silent

from llm_duel_env.baselines.uniform import Uniform
from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.runner import RunInterrupted, run
from llm_duel_env.tasks.base import TaskView


def test_prepare_is_called_once_before_anything_and_not_on_resume(tmp_path, monkeypatch):
    calls = []

    class Prepared(Uniform):
        stops = True

        def prepare(self, task):
            calls.append(("prepare", self.round, task))
            assert len(task.observe(range(task.train_prompts))["prompt_id"]) == task.train_prompts
            assert not hasattr(task, "oracle")

        def act(self, observation):
            calls.append(("act", self.round))
            return super().act(observation)

        def respond(self, observation):
            calls.append(("respond", self.round))
            return super().respond(observation)

    monkeypatch.setattr(registry, "load_agent", lambda name: Prepared)
    told = config(tmp_path / "run", overrides={}, budget=40)
    from llm_duel_env.benchmark.session import Session

    played = Session.play_round

    def interrupted(self):
        played(self)
        if self.core.round == 2:
            self.save()
            raise RunInterrupted(self.folder.path, self.queries)

    monkeypatch.setattr(Session, "play_round", interrupted)
    with pytest.raises(RunInterrupted):
        run(told, say=silent)
    monkeypatch.setattr(Session, "play_round", played)
    assert run(told, resume=True, say=silent)["queries"] == 40
    prepared = [call for call in calls if call[0] == "prepare"]
    assert len(prepared) == 1
    assert calls[0] == prepared[0]
    assert isinstance(prepared[0][2], TaskView)
    assert [call[1] for call in calls if call[0] == "act"] == list(range(len([c for c in calls if c[0] == "act"])))
