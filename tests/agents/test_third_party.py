"""An agent in a package of somebody else's, found through its entry point, passes the suite that every agent passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = ("acts_updates", "same_seed", "never_seen", "budget_is_spent", "test_learns")


@pytest.mark.slow
def test_an_agent_in_its_own_package_passes_the_suite_of_all_agents(tmp_path):
    """The package is the first example, installed as pip would install it: a module, and metadata beside it."""
    (tmp_path / "their_agent.py").write_text((ROOT / "examples/my_first_agent.py").read_text())
    metadata = tmp_path / "their_agent-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-agent\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[llm_duel_env.agents]\ntheir_agent = their_agent:LinearDuelist\n")
    suite = [str(ROOT / "tests/agents/test_every_agent.py"), "-k", f"their_agent and ({' or '.join(CHECKS)})"]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *suite],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = found.stdout + found.stderr
    assert found.returncode == 0, said
    passed = re.findall(r"test_every_agent\.py::(\w+)\[their_agent[^\]]*\] PASSED", found.stdout)
    assert len(passed) == len(CHECKS), said
    assert all(any(check in name for name in passed) for check in CHECKS), said
    assert "SKIPPED" not in said
