"""The house stands as its plan says: links, short names refused, agents small."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("wing", ["agents", "baselines"])
def test_the_wings_are_seen_at_the_top_level(wing):
    link = ROOT / wing
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / "llm_duel_env" / wing


@pytest.mark.parametrize("wing", ["agents", "baselines"])
def test_the_short_name_is_refused(monkeypatch, wing):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, wing, raising=False)
    with pytest.raises(ImportError, match=f"import llm_duel_env.{wing}"):
        importlib.import_module(wing)


@pytest.mark.slow
def test_coverage_sees_the_wings_under_their_package_and_once(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("import llm_duel_env.agents.sea\nimport llm_duel_env.baselines.uniform\n")
    coverage = [sys.executable, "-m", "coverage"]
    settings = ["--rcfile", str(ROOT / "pyproject.toml"), f"--data-file={tmp_path / 'coverage'}"]
    subprocess.run([*coverage, "run", *settings, str(probe)], cwd=ROOT, check=True, timeout=280)
    report = [*coverage, "json", *settings, "-o", str(tmp_path / "report.json")]
    subprocess.run(report, cwd=ROOT, check=True, timeout=120, capture_output=True)
    files = json.loads((tmp_path / "report.json").read_text())["files"]
    for path in ("agents/sea.py", "baselines/uniform.py"):
        assert [name for name in files if name.endswith(path)] == [f"llm_duel_env/{path}"]
        assert files[f"llm_duel_env/{path}"]["summary"]["covered_lines"] > 5


def test_an_agent_file_is_short():
    files = [*(ROOT / "llm_duel_env/agents").glob("*.py"), *(ROOT / "llm_duel_env/baselines").glob("*.py")]
    assert len(files) > 5
    long = {file.name: n for file in files if (n := len(file.read_text().splitlines())) > 300}
    assert not long
