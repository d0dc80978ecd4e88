"""Builds TinyTLDR's embedded models from nothing: `python -m llm_duel_env.assets.build_tiny_tldr --out DIR --seed 0`.

Two cores, a quarter of an hour. Phase 1 teaches the policy to copy facts with their binding, phase 2 to write random
summaries (the supervised policy); the reward model starts from that policy's body and learns the utility's preferences.
Then everything the README claims is measured and written to `measured.json`. The same seed, machine and thread count
give the same assets.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from llm_duel_env.assets import tiny_supervision as supervision
from llm_duel_env.assets.tiny_measure import measure_policy, measure_reward_model, sample
from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.tiny_words import CONTROL_TOKENS, vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
ROPE_THETA = 1e6
"""Slow rotary frequencies: most coordinates of a head hardly turn over a post, so tokens can be matched in them."""
HELDOUT_PROMPTS = 1024
BINDING_STEPS, ENCODER_STEPS, REWARD_STEPS = 300, 500, 900
SUPERVISED = (
    (2, 1100, 1.5e-3, supervision.CARELESS, 0.02),
    (8, 900, 1.2e-3, supervision.CARELESS, 0.02),
    (10, 700, 1.0e-3, supervision.CARELESS, 0.02),
    (11, 500, 1.2e-3, supervision.CAREFUL, 0.2),
)
"""The supervised phase in parts, each with a falling rate: number of its random stream, steps, peak rate, the writers'
taste, weight of the prompt's own tokens in the loss. The last part makes the model heed what a post is about."""
BATCH = 64
REWARD_PROMPTS = 3000
GROUP, GROUPS = 8, 16
"""Responses of one prompt that meet in the reward model's loss (all pairs), and prompts in its batch."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words are what whitespace separates; a prompt gets <bos> and no <eos>."""
    words = [*SPECIAL, *CONTROL_TOKENS, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **names,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_policy(vocabulary_size: int) -> LlamaForCausalLM:
    """An untrained policy. Head size 32 and a vocabulary padded to a multiple of 16, as inference engines like it."""
    config = LlamaConfig(
        vocab_size=math.ceil(vocabulary_size / 16) * 16,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.04,
        attention_dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    plant_copying(model)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=language.MAX_WORDS + 1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return model


@torch.no_grad()
def plant_copying(model: LlamaForCausalLM) -> None:
    """Starts the first two layers as the circuit that copies: who was followed by whom, before any training.

    Left to itself a model this small needs thousands of steps to find it. Head 0 of layer 0 looks one token back (a
    constant in the embeddings, turned by one position of the rotary frequencies) and writes that token's code beside
    the token; head 0 of layer 1 looks for a token whose predecessor is the current one and proposes it. All else stays
    random, and everything is trained from there.
    """
    half = 16  # pairs of rotary coordinates (i, i + 16) in a head of 32
    frequency = ROPE_THETA ** (-torch.arange(half) / half)
    fast, slow = torch.arange(0, 5), torch.arange(5, half)  # fast ones tell positions apart, slow ones barely turn
    coordinates = torch.cat([slow, slow + half])
    codes = len(coordinates)
    content = slice(1, 128 - codes)  # the embeddings' own coordinates; 0 is the constant, the last hold the code
    embedding = model.model.embed_tokens.weight
    spread = 0.06
    embedding.mul_(spread / embedding.std())
    embedding[:, 0] = 4 * spread
    embedding[:, 128 - codes :] = 0.0
    width = 128 - codes - 1
    code = torch.randn(codes, width) / math.sqrt(width)

    for layer in model.model.layers:  # the random rest starts quietly, or it would drown the code
        layer.mlp.down_proj.weight.mul_(0.3)
        layer.self_attn.o_proj.weight.mul_(0.3)
    look, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for weight in (look.q_proj, look.k_proj, look.v_proj, match.q_proj, match.k_proj):
        weight.weight[:32] = 0.0
    look.k_proj.weight[fast, 0] = 3.0
    look.q_proj.weight[fast, 0] = 3.0 * torch.cos(frequency[fast])
    look.q_proj.weight[fast + half, 0] = -3.0 * torch.sin(frequency[fast])
    look.v_proj.weight[:codes, content] = code
    look.o_proj.weight[:, :32] = 0.0
    look.o_proj.weight[128 - codes :, :codes] = 4 * spread * torch.eye(codes)
    match.q_proj.weight[coordinates, content] = 4.0 * code
    match.k_proj.weight[coordinates, 128 - codes :] = torch.eye(codes)
    shown = torch.randn(32, width) / math.sqrt(width)
    match.v_proj.weight[:32] = 0.0
    match.v_proj.weight[:32, content] = shown
    match.o_proj.weight[:, :32] = 0.0
    match.o_proj.weight[content, :32] = 6 * spread * shown.T


def optimise(
    model: torch.nn.Module,
    steps: int,
    rate: float,
    loss_of_batch: Callable[[int], Tensor],
    name: str,
    final: float = 0.02,
) -> None:
    """AdamW with a short warm-up and a cosine down to `final` of the rate; prints the mean loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    began, running = time.time(), 0.0
    for step in range(steps):
        scale = min(1.0, (step + 1) / 50) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        loss = loss_of_batch(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {running / 100:.4f} {time.time() - began:.0f} s", flush=True)
            running = 0.0
    model.eval()


def train_language_model(
    model: LlamaForCausalLM,
    words: dict[str, int],
    make_row: Callable[[random.Random, str], tuple[str, str]],
    posts: Sequence[str],
    steps: int,
    rate: float,
    rng: random.Random,
    name: str,
    final: float,
    prompt_weight: float,
) -> None:
    """Next-token training on rows (prompt, response), the prompt's own tokens weighted by `prompt_weight`."""
    pool: list[list[tuple[list[int], int]]] = []
    heard: list[float] = []  # the responses' own loss

    def loss_of_batch(step: int) -> Tensor:
        if not pool:  # rows of 8 batches are sorted by length, so that little of a batch is padding
            rows = []
            for _ in range(8 * BATCH):
                prompt, response = make_row(rng, rng.choice(posts))
                start = [BOS, *(words[word] for word in prompt.split())]
                rows.append(([*start, *(words[word] for word in response.split()), EOS], len(start)))
            rows.sort(key=lambda row: len(row[0]))
            pool.extend(rows[k : k + BATCH] for k in range(0, len(rows), BATCH))
            rng.shuffle(pool)
        batch = pool.pop()
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in batch])
        weights = torch.tensor(
            [[prompt_weight] * (n - 1) + [1.0] * (len(row) - n) + [0.0] * (width - len(row)) for row, n in batch]
        )
        # Padding stands on the right of a causal model: no mask is needed, the loss ignores it.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        chosen = weights.flatten() == 1.0
        heard.append(losses.detach()[chosen].mean().item())
        if len(heard) % 100 == 0:
            print(f"{name}: nats per response token {sum(heard[-50:]) / 50:.4f}", flush=True)
        return (losses * weights.flatten()).sum() / chosen.sum()

    optimise(model, steps, rate, loss_of_batch, name, final)


def reward_responses(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> list[list[str]]:
    """For each prompt, the responses that the reward model learns from: sampled, conditioned, edited, near the best."""
    rng = random.Random(seed)
    plain = sample(policy, tokenizer, prompts, 8, seed + 1)
    good = sample(policy, tokenizer, [language.with_control(p, "<good>") for p in prompts], 3, seed + 2)
    bad = sample(policy, tokenizer, [language.with_control(p, "<bad>") for p in prompts], 1, seed + 3)
    responses = []
    for k, prompt in enumerate(prompts):
        best = language.optimum(prompt)[0]
        made = [best, *(supervision.near_optimum(rng, prompt) for _ in range(6))]
        made += [language.edit(prompt, plain[k][0], plain[k][1]), language.degrade(prompt, best, rng.randrange(1, 5))]
        made += [language.degrade(prompt, good[k][0], rng.randrange(1, 5)), supervision.random_summary(rng, prompt)]
        responses.append(list(dict.fromkeys([*plain[k], *good[k], *bad[k], *made])))
    return responses


@dataclass(frozen=True)
class Packed:
    """GROUPS prompts with GROUP responses each, packed so that responses share one copy of their prompt.

    Responses stand side by side in one row; each sees the prompt and itself only, and counts positions from the
    prompt's end, so that its hidden states are the ones that the response alone would get.
    """

    texts: list[tuple[str, list[str]]]
    """Each prompt with its responses."""
    ids: Tensor
    positions: Tensor
    owner: Tensor
    """0 the prompt, 1 .. GROUP a response, -1 padding; as `ids` (GROUPS, width)."""
    ends: Tensor
    """(GROUPS, GROUP): where each response's EOS stands."""

    def hidden(self, body: LlamaModel) -> Tensor:
        """Last hidden states, (GROUPS, width, H)."""
        width = self.ids.shape[1]
        same = self.owner[:, :, None] == self.owner[:, None, :]
        visible = (same | (self.owner[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
        return body(input_ids=self.ids, attention_mask=mask, position_ids=self.positions, use_cache=False)[0]


def pack(
    words: dict[str, int], prompts: Sequence[str], responses: Sequence[Sequence[str]], rng: random.Random
) -> Packed:
    """GROUPS random prompts with GROUP random responses to each."""
    unknown = SPECIAL.index("<unk>")
    texts, rows = [], []
    for _ in range(GROUPS):
        k = rng.randrange(len(prompts))
        chosen = rng.sample(responses[k], min(GROUP, len(responses[k])))
        chosen += [chosen[0]] * (GROUP - len(chosen))
        texts.append((prompts[k], chosen))
        pieces = [[BOS, *(words.get(word, unknown) for word in prompts[k].split())]]
        rows.append(pieces + [[*(words.get(word, unknown) for word in text.split()), EOS] for text in chosen])
    width = max(sum(map(len, pieces)) for pieces in rows)
    ids = torch.full((GROUPS, width), PAD)
    positions = torch.zeros((GROUPS, width), dtype=torch.long)
    owner = torch.full((GROUPS, width), -1)
    ends = torch.zeros((GROUPS, GROUP), dtype=torch.long)
    for r, pieces in enumerate(rows):
        at, start = 0, len(pieces[0])
        for k, piece in enumerate(pieces):
            ids[r, at : at + len(piece)] = torch.tensor(piece)
            first = 0 if k == 0 else start
            positions[r, at : at + len(piece)] = torch.arange(first, first + len(piece))
            owner[r, at : at + len(piece)] = k
            at += len(piece)
            if k:
                ends[r, k - 1] = at - 1
    return Packed(texts, ids, positions, owner, ends)


def train_encoder(
    model: LlamaForCausalLM,
    words: dict[str, int],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    steps: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Teaches a copy of the policy to *describe* a response (`tiny_language.describe`), not to judge it.

    Squared error of a linear readout of the mean hidden state over the response's tokens. The readout is thrown away.
    """
    readout = torch.nn.Linear(model.config.hidden_size, len(language.describe(prompts[0], "")))
    model.readout = readout  # trained along

    def loss_of_batch(step: int) -> Tensor:
        batch = pack(words, prompts, responses, rng)
        hidden = batch.hidden(model.model)
        member = (
            batch.owner[:, None, :] == torch.arange(1, GROUP + 1)[None, :, None]
        ).float()  # (GROUPS, GROUP, width)
        mean = member @ hidden / member.sum(-1, keepdim=True)
        truth = torch.tensor([[language.describe(prompt, text) for text in group] for prompt, group in batch.texts])
        return (readout(mean) - truth).square().mean()

    optimise(model, steps, rate, loss_of_batch, "encoder")
    del model.readout


def train_reward_model(
    model: LlamaForSequenceClassification,
    words: dict[str, int],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    steps: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Bradley-Terry loss over all pairs of a group of responses to one prompt, against the utility's probabilities."""

    def loss_of_batch(step: int) -> Tensor:
        batch = pack(words, prompts, responses, rng)
        hidden = batch.hidden(model.model)
        at_ends = hidden.gather(1, batch.ends[:, :, None].expand(-1, -1, hidden.shape[-1]))
        scores = model.score(at_ends).squeeze(-1)  # (GROUPS, GROUP)
        truth = torch.tensor([[language.utility(prompt, text) for text in group] for prompt, group in batch.texts])
        first, second = torch.triu_indices(GROUP, GROUP, offset=1)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            scores[:, first] - scores[:, second], torch.sigmoid(truth[:, first] - truth[:, second])
        )

    optimise(model, steps, rate, loss_of_batch, "reward model")


def write_references(
    out: Path,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    posts: Sequence[str],
    heldout: Sequence[str],
    seed: int,
) -> None:
    """Stores one sample of the supervised policy for each held-out and each training prompt."""
    references = [texts[0] for texts in sample(policy, tokenizer, heldout, 1, seed + 3)]
    with (out / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for k, (prompt, reference) in enumerate(zip(heldout, references, strict=True)):
            file.write(json.dumps({"prompt_id": k, "prompt": prompt, "reference": reference}) + "\n")
    references = [texts[0] for texts in sample(policy, tokenizer, posts, 1, seed + 9)]
    with (out / "references_train.jsonl").open("w", encoding="utf-8") as file:
        for k, reference in enumerate(references):  # the prompts themselves are generated from their numbers
            file.write(json.dumps({"prompt_id": k, "reference": reference}) + "\n")


def build(out: Path, seed: int, effort: float = 1.0) -> dict[str, float]:
    """Builds and measures all assets in `out`. `effort` scales the training steps (below 1 for a trial)."""
    began = time.time()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)  # the models' initial weights; everything else draws from its own generator
    tokenizer = build_tokenizer()
    words = tokenizer.get_vocab()
    posts = [language.train_prompt(k) for k in range(language.TRAIN_PROMPTS)]
    heldout = [language.heldout_prompt(k) for k in range(HELDOUT_PROMPTS)]
    if set(posts) & set(heldout):
        raise RuntimeError("expected held-out prompts that are not training prompts, got a shared one")

    policy = build_policy(len(tokenizer))
    train_language_model(
        policy, words, lambda rng, prompt: (prompt, supervision.all_facts(rng, prompt)), posts,
        int(effort * BINDING_STEPS), 1.5e-3, random.Random(seed + 1), "binding", 0.5, 0.02,
    )  # fmt: skip
    bound = measure_policy(policy, tokenizer, heldout[:16], seed)["stated_facts_in_post"]
    print(f"after the binding phase {bound:.3f} of the facts stated are in the post", flush=True)
    for part, steps, rate, taste, prompt_weight in SUPERVISED:
        train_language_model(
            policy, words, functools.partial(supervision.supervised_row, taste=taste), posts,
            int(effort * steps), rate, random.Random(seed + part), "supervised", 0.02, prompt_weight,
        )  # fmt: skip
    policy.save_pretrained(out / "policy")
    tokenizer.save_pretrained(out / "policy")
    write_references(out, policy, tokenizer, posts, heldout, seed)
    print(f"policy saved after {time.time() - began:.0f} s", flush=True)
    measured = measure_policy(policy, tokenizer, heldout[:256], seed + 4)
    print(json.dumps(measured, indent=1), flush=True)

    prompts = posts[: int(min(1.0, 4 * effort) * REWARD_PROMPTS)]
    responses = reward_responses(policy, tokenizer, prompts, seed + 5)
    print(f"reward model's data sampled after {time.time() - began:.0f} s", flush=True)
    encoder = copy.deepcopy(policy)
    train_encoder(encoder, words, prompts, responses, int(effort * ENCODER_STEPS), 1e-3, random.Random(seed + 12))
    encoder.save_pretrained(out / "encoder")
    tokenizer.save_pretrained(out / "encoder")
    reward_config = LlamaConfig(**policy.config.to_dict())
    reward_config.num_labels = 1
    reward_model = LlamaForSequenceClassification(reward_config)
    reward_model.model.load_state_dict(policy.model.state_dict())
    train_reward_model(
        reward_model, words, prompts, responses, int(effort * REWARD_STEPS), 1e-3, random.Random(seed + 6)
    )
    reward_model.save_pretrained(out / "reward_model")
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out / "reward_model")
    measured |= measure_reward_model(policy, reward_model, tokenizer, heldout[:256], seed + 7)
    measured |= {
        "policy_parameters": sum(p.numel() for p in policy.parameters()),
        "reward_model_parameters": sum(p.numel() for p in reward_model.parameters()),
        "vocabulary": len(tokenizer),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "build_seconds": round(time.time() - began),
    }
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1), flush=True)
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build TinyTLDR's embedded models.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="scales the training steps, below 1 for a trial")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    build(options.out, options.seed, options.effort)


if __name__ == "__main__":
    main()
