"""``python -m llm_duel_env.benchmark.docs [ROOT]``: writes the generated documentation of a checkout (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

from llm_duel_env.benchmark.docs.tree import write

if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(path)
