"""What the pages of oracles show runs: commands against servers of the tests', the Python block as it stands."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm_duel_env import cli
from llm_duel_env.oracles.catalogue import KINDS
from llm_duel_env.oracles.http_client import Patience
from llm_duel_env.tasks.tiny_tldr import ASSETS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "oracles.md", *sorted((DOCS / "oracles").glob("*.md")), DOCS / "add-an-oracle.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
NAMES = dict(re.findall(r'^(TASK|RUN)="(.*)"$', "\n".join(LINES), re.MULTILINE))
COMMANDS = [line for line in LINES if line.startswith("$RUN")]


def words(line, **changed):
    """A command's words, with the document's variables filled in."""
    for name, value in (*NAMES.items(), ("ASSETS", str(ASSETS)), *changed.items()):
        line = line.replace(f"${name}", value)
    return shlex.split(line)


def play(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0


def test_every_kind_is_in_the_document():
    for kind in KINDS:
        assert f"| [`{kind}" in TEXT
    assert len(COMMANDS) == 4
    for name in ("connect_timeout", "read_timeout", "deadline", "attempts", "backoff"):
        default = getattr(Patience(), name)
        assert re.search(rf"`{name}`,? \(?{default:g}", TEXT), name


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.rpartition("oracle=")[2][:6])
def test_the_commands_run(line, tmp_path, monkeypatch, serve):
    def scores(_path, body):
        return {"model": "rm", "scores": [float(len(text["response"])) for text in body["texts"]]}

    def verdicts(_path, _body):
        return {"choices": [{"message": {"content": "[[A]]"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 100))
    if "127.0.0.1:8765" in line:
        line = line.replace("http://127.0.0.1:8765", serve(scores).url)
    if "127.0.0.1:8000" in line:
        line = line.replace("http://127.0.0.1:8000", serve(verdicts).url)
    program, *arguments = words(line)
    assert program == "llm-duel"
    play(arguments)
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["queries"] == 16


def test_the_server_is_started_with_options_that_it_has(monkeypatch):
    (line,) = [line for line in LINES if "serve-oracle" in line]
    asked = []
    monkeypatch.setattr("llm_duel_env.oracles.serve.serve", asked.append)
    play(words(line)[1:])
    assert (asked[0].port, asked[0].host, asked[0].model) == (8765, "127.0.0.1", str(ASSETS / "reward_model"))


def test_the_python_block_runs(tmp_path):
    (block,) = [block for language, block in BLOCKS if language == "python" and "class Shorter" in block]
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "[1.]\n"), done.stderr
