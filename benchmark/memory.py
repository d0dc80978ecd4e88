"""Peak memory of one learning step, the plain way and ours: `python benchmark/memory.py`.

A small Llama with a large vocabulary is shown pairs of responses, and the gradient of DPO is computed on all of them at
once. Each way runs in a process of its own; what is told is the process's peak less what it held before the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llm_duel_env.agents.policies import checkpointing, packed_rows, shared_prefix
from llm_duel_env.agents.policies.output_layer import is_linear
from llm_duel_env.agents.policies.scoring import log_probs

WAYS = {
    "plain": "prompts copied, logits of every position",
    "response": "logits at response positions, prompt shared",
    "chunked": "the same, some positions at a time",
    "packed": "the same, both responses behind their prompt in one row",
    "checkpointed": "the same, layers computed again",
}


def make_model(vocabulary: int, hidden: int, layers: int) -> PreTrainedModel:
    """A random Llama in float32."""
    torch.manual_seed(0)  # a script of its own
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def plain(model: PreTrainedModel, prompts: list[list[int]], tokens: Tensor) -> Tensor:
    """As a first implementation has it: (M, 2)."""
    m, n, t = tokens.shape
    ids = torch.cat([torch.tensor(prompts).repeat_interleave(n, 0), tokens.flatten(0, 1)], dim=1)
    table = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return table.gather(-1, ids[:, 1:, None])[..., -t:, 0].sum(-1).view(m, n)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of one way, and the loss, which is the same for all."""
    model = make_model(args.vocabulary, args.hidden, args.layers)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, args.vocabulary, (args.rows // 2, args.prompt), generator=draw).tolist()
    tokens = torch.randint(3, args.vocabulary, (args.rows // 2, 2, args.tokens), generator=draw)
    lengths = torch.full(tokens.shape[:2], args.tokens)
    assert all(check(model) for check in (shared_prefix.works, packed_rows.works, is_linear))
    if args.way == "checkpointed":
        checkpointing.enable(model)
    before, start = resident_from_here(), time.perf_counter()
    if args.way == "plain":
        values = plain(model, prompts, tokens)
    else:
        once, packed = args.way == "checkpointed", args.way in ("packed", "checkpointed")
        ways = {"linear_head": args.way != "response", "packed": packed, "one_call": once}
        with checkpointing.checkpointing(model, once):
            values = log_probs(model, prompts, tokens, lengths, **ways)
    loss = -torch.nn.functional.logsigmoid(0.1 * (values[:, 0] - values[:, 1])).mean()
    with checkpointing.checkpointing(model, args.way == "checkpointed"):
        loss.backward()
    seconds = time.perf_counter() - start
    added = peak() - before
    gradient = float(sum(p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    return {"bytes": added, "seconds": seconds, "loss": float(loss.detach()), "gradient": gradient}


def resident_from_here() -> int:
    """Bytes that this process holds now; `peak` counts from here, not from the loading of models and libraries."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is reset to what is held
    return peak()


def peak() -> int:
    """The most bytes that this process has held since `resident_from_here`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Measures one way, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256, help="responses, two to a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--way", choices=list(WAYS), help="measure one, in this process, and print JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    print(
        f"{args.rows} responses of {args.tokens} tokens, prompts of {args.prompt}, {args.vocabulary:,} words; one step"
    )
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
        results[way] = json.loads(done.stdout.splitlines()[-1])
        mega, factor = results[way]["bytes"] / 2**20, results["plain"]["bytes"] / results[way]["bytes"]
        told = (
            f"{mega:>8,.0f} MB  1/{factor:<5.1f} {results[way]['seconds']:>6.1f} s  norm {results[way]['gradient']:.5f}"
        )
        print(f"{way:<13}{told}  {WAYS[way]}", flush=True)


if __name__ == "__main__":
    main()
