"""The README's commands run and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [
    line.split("  #")[0].strip() for language, block in BLOCKS if language == "bash" for line in block.splitlines()
]
LINES = [line for line in LINES if line]


def run(command, cwd):
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_commands():
    assert sum(line.startswith("llm-duel") for line in LINES) >= 4
    assert sum(line.startswith("make") for line in LINES) >= 3


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make")])
def test_make_verbs_exist(line):
    run(["make", "--dry-run", *line.split()[1:]], ROOT)


def test_llm_duel_commands_run_in_order(tmp_path):
    for line in LINES:
        if line.startswith("llm-duel"):
            assert run(line.split(), tmp_path).strip(), line
    assert list(tmp_path.rglob("*.png"))


def test_every_command_is_one_that_is_checked():
    # pip belongs to the set-up that CI itself goes through.
    assert {line.split()[0] for line in LINES} <= {"make", "llm-duel", "pip"}


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(block, tmp_path):
    assert run([sys.executable, "-c", block], tmp_path).strip()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/status.md", "docs/decisions.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|yaml|json|png))`|\]\((?!http)([^)#]+)\)", text)
    named += [(folder, "") for folder in re.findall(r"\b(benchmark/results/[\w.@-]+)", text)]
    assert named
    for name in (a or b for a, b in named):
        assert (ROOT / name).exists(), name
