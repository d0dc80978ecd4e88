"""The engine against its peers and against the machine. `make bench-engine`; its parts can be named.

sampler  tokens per second beside Hugging Face `generate(num_return_sequences=20)`, and the arithmetic floor
trl      pairs per second of a whole online-DPO round (two samples a prompt, reward model, one optimizer step) beside
         TRL's OnlineDPOTrainer: as it comes, and without gradient checkpointing
memory   peak of such rounds, each side in a process of its own
scaling  seconds of a round's stages against prompts M, candidates N, response tokens T and the size of the model
ranks    seconds of a round on one rank and on two

Both sides get the same prompts, which neither has seen before, the same models, limits, temperature and threads, and
take turns in one process. Medians. vLLM has an environment of its own: `make bench-vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from memory import peak, resident_from_here
from speed import alternate, flops, matmul_rate, plain_sample, play_round

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.samplers.torch_sampler import sample_tokens
from llm_duel_env.agents.policies.scoring import log_probs
from llm_duel_env.agents.policies.shared_prefix import works
from llm_duel_env.tasks import make_task

M, N = 32, 20
RATE = 1e-5
"""Learning rate of the rounds that are timed: small, so that the length of responses stays as it is."""
PARTS = ("sampler", "trl", "memory", "scaling", "ranks")


def tokenizer_of(folder: str) -> Any:
    """The tokenizer in a folder, padding on the left."""
    return transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


class Fresh:
    """M prompts that nobody has seen, at every call."""

    def __init__(self, task: Any, count: int = M) -> None:
        self.task, self.count, self.next = task, count, 0

    def __call__(self) -> Any:
        """The next ones, as an observation."""
        ids = np.arange(self.next, self.next + self.count) % self.task.train_prompts
        self.next += self.count
        return self.task.observe(ids)


def sampler(repeats: int) -> dict[str, Any]:
    """Tokens per second, ours and `generate`'s."""
    task = make_task("tiny_tldr")
    agent = OnlineDPO(task.view(), OnlineDPO.configure({"policy.temperature": 1.0}), seed=0, budget=10_000)
    policy = agent.policy
    assert isinstance(policy, LanguageModelPolicy)
    tokenizer, limit, fresh = tokenizer_of(task.view().model), policy.tokens.max_new_tokens, Fresh(task)
    tokens: dict[str, list[float]] = {"ours": [], "generate": []}
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    for number in range(repeats + 1):
        observation = fresh()
        texts = list(observation["prompt"])
        width = tokenizer(texts, padding=True, return_tensors="pt").input_ids.shape[1]
        begun = time.perf_counter()
        drawn = policy.sample(observation, N, ("bench", number))
        middle = time.perf_counter()
        out = plain_sample(policy.model, tokenizer, texts, N, limit)
        spent = {"ours": middle - begun, "generate": time.perf_counter() - middle}
        made = {
            "ours": float(drawn.lengths.sum()),
            "generate": float((out[:, width:] != tokenizer.pad_token_id).sum()),
        }
        for side in rates if number else ():  # the first is for warming up
            rates[side].append(made[side] / spent[side])
            tokens[side].append(made[side])
    observation = fresh()
    floor = flops(lambda: policy.sample(observation, N, ("floor",))) / matmul_rate()
    ours = statistics.median(rates["ours"])
    took = statistics.median(tokens["ours"]) / ours
    return {
        "tokens/s": ours,
        "generate tokens/s": statistics.median(rates["generate"]),
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"])),
        "tokens a draw": statistics.median(tokens["ours"]),
        "x floor": took / floor,
    }


# --- a whole online-DPO round -----------------------------------------------------------------------------------------


def our_round(task: Any, fresh: Fresh, batch: int) -> Callable[[], None]:
    """A round of online DPO: two samples a prompt, the reward model's label, one optimizer step."""
    overrides = {
        "policy.temperature": 1.0,
        "policy.learning_rate": RATE,
        "policy.batch": batch,
        "policy.microbatch": batch,
    }
    agent = OnlineDPO(task.view(), OnlineDPO.configure(overrides), seed=0, budget=1_000_000)
    return lambda: play_round(agent, task, fresh())


def trl_round(task: Any, fresh: Fresh, **settings: Any) -> Callable[[], None]:
    """The same by TRL's trainer, with its defaults but for `settings` and what makes the two comparable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the module is experimental
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    folder, reward = task.view().model, task.oracle.model
    load = transformers.AutoModelForCausalLM.from_pretrained
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        trainer = OnlineDPOTrainer(
            model=load(folder, dtype=torch.float32),
            ref_model=load(folder, dtype=torch.float32),
            reward_funcs=reward,
            reward_processing_classes=task.oracle.tokenizer,
            args=OnlineDPOConfig(
                output_dir=out, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
                learning_rate=RATE, temperature=1.0, max_new_tokens=task.view().max_new_tokens, beta=0.1, **settings,
            ),
            train_dataset=[],
            processing_class=tokenizer_of(folder),
        )  # fmt: skip
    optimizer = trainer.create_optimizer()
    trainer.model = trainer.accelerator.prepare_model(trainer.model)

    def step() -> None:
        trainer.training_step(trainer.model, {"prompt": list(fresh()["prompt"])})
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sides(task: Any, batch: int) -> dict[str, Callable[[], None]]:
    """The rounds that are compared, each on prompts of its own that are fresh: the same ones in the same order."""
    return {
        "ours": our_round(task, Fresh(task, batch), batch),
        "TRL, its defaults": trl_round(task, Fresh(task, batch)),
        "TRL, no gradient checkpointing": trl_round(task, Fresh(task, batch), gradient_checkpointing=False),
    }


def trl(repeats: int) -> dict[str, Any]:
    """Pairs per second of each side at two batch sizes."""
    found: dict[str, Any] = {}
    for batch in (M, 128):
        task = make_task("tiny_tldr", oracle="reward_model")
        times = alternate(repeats, **sides(task, batch))
        for side, took in times.items():
            found[f"{side}, batch {batch}: pairs/s"] = batch / took
        for side in list(times)[1:]:
            found[f"ours / {side}, batch {batch}"] = times[side] / times["ours"]
    return found


def peak_of(side: str, batch: int, rounds: int = 3) -> float:
    """MB that rounds of one side add to what the process held with its models loaded: in this process."""
    task = make_task("tiny_tldr", oracle="reward_model")
    fresh = Fresh(task, batch)
    work = our_round(task, fresh, batch) if side == "ours" else trl_round(
        task, fresh, **({} if "defaults" in side else {"gradient_checkpointing": False})
    )  # fmt: skip
    before = resident_from_here()
    for _ in range(rounds):
        work()
    return (peak() - before) / 2**20


def memory(_repeats: int) -> dict[str, Any]:
    """Peak of three rounds at two batch sizes, each side in a process of its own."""
    found = {}
    for batch in (M, 128):
        for side in ("ours", "TRL, its defaults", "TRL, no gradient checkpointing"):
            command = [sys.executable, __file__, "--peak", side, str(batch), "--threads", str(torch.get_num_threads())]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[f"{side}, batch {batch}: MB"] = float(told.splitlines()[-1])
    return found


# --- what a round costs -----------------------------------------------------------------------------------------------


def model_of(hidden: int, layers: int) -> transformers.PreTrainedModel:
    """A random Llama over 512 words: heads of size 32."""
    torch.manual_seed(0)  # a script of its own
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def round_of(model: transformers.PreTrainedModel, m: int, n: int, t: int) -> dict[str, Callable[[], object]]:
    """Sampling and learning of one round on random prompts of 70 tokens: responses never end before T."""
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 512, (m, 70), generator=draw).tolist()
    uniform = torch.rand(m, n, t, dtype=torch.float64, generator=draw)
    pair, lengths = torch.randint(0, 512, (m, 2, t), generator=draw), torch.full((m, 2), t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    assert works(model)

    def learn() -> None:
        optimizer.zero_grad()
        score = log_probs(model, prompts, pair, lengths, linear_head=True, packed=True)
        (-torch.nn.functional.logsigmoid(0.1 * (score[:, 0] - score[:, 1])).mean()).backward()
        optimizer.step()

    return {
        "sample": lambda: sample_tokens(model, prompts, uniform, n=n, max_new_tokens=t, eos=()),
        "learn": learn,
    }


def scaling(repeats: int) -> dict[str, Any]:
    """Seconds of each stage, and how far from the floor, with one of M, N, T and the model's size changed at a time."""
    base = {"m": M, "n": N, "t": 28, "hidden": 128}
    steps = {"m": (8, 16, 64, 128), "n": (2, 5, 10, 40), "t": (7, 14, 56), "hidden": (64, 256, 512)}
    rate, found = matmul_rate(), {}
    for changed in [{}, *({name: value} for name, values in steps.items() for value in values)]:
        shape = {**base, **changed}
        model = model_of(shape["hidden"], layers=4)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        name = f"M {shape['m']}, N {shape['n']}, T {shape['t']}, {size:.1f} M parameters"
        for stage, work in round_of(model, shape["m"], shape["n"], shape["t"]).items():
            took = alternate(repeats, ours=work)["ours"]
            found[f"{name}: {stage}, seconds"] = took
            found[f"{name}: {stage}, x floor"] = took / (flops(work) / rate)
    return found


def ranks(_repeats: int) -> dict[str, Any]:
    """Seconds of a round of SEA on TinyTLDR, without evaluation: a rank with one thread and with two, two ranks."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as out:
        for count, threads in ((1, 1), (1, 2), (2, 1)):
            folder = Path(out) / f"{count}-{threads}"
            command = [sys.executable, "-m", "llm_duel_env.cli", "run", "--agent", "sea", "--env", "duel/TinyTLDR-v0"]
            command += [
                "--budget",
                "320",
                "--eval-every",
                "1",
                "--eval-prompts",
                "16",
                "--folder",
                str(folder),
                "--ranks",
            ]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run([*command, str(count)], env=env, check=True, capture_output=True)
            result = json.loads((folder / "result.json").read_text())
            spent = sum(result["time"][name] for name in ("act", "step", "update"))
            found[f"{count} rank{'s' * (count > 1)}, {threads} thread{'s' * (threads > 1)} each: seconds a round"] = (
                spent / result["rounds"]
            )
    one, _, two = found.values()
    return {**found, "two ranks / one, a thread each": one / two}


def main() -> None:
    """Measures the parts asked for and prints them; JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each side (default 7)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_of(arguments.peak[0], int(arguments.peak[1])))
        return
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"expected parts among {PARTS}, got {sorted(unknown)}")
    transformers.logging.set_verbosity_error()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; ", end="")
    print(f"Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; medians of {arguments.repeats}")
    found = {}
    for name in arguments.parts:
        found[name] = globals()[name](arguments.repeats)
        print(f"\n{name}")
        for what, value in found[name].items():
            print(f"  {what:<64}{value:>12.4g}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
