"""Experts that saw few tokens: whose eigenbases should they have? Three rules against the fit of many sequences.

python benchmarks/few_tokens.py

A mixture (Qwen 3's code, 2 blocks, width 32, 16 experts, two to a token) is trained on drawn Markov chains. EK-FAC over
its experts, in float64 by plain autograd, is fitted on few sequences, with an expert's A and S

    own       its own, whatever it saw (with nothing seen: none, so Lambda is that of the axes)
    shrunk    with its stack's mean counted as n further tokens, n the moment's width (what infscan does)
    shared    its stack's mean

and its scores of 60 other sequences are held against those of `own` fitted on 400: the mean correlation of 4 queries.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

VOCAB, T, EXPERTS = 64, 32, 16
RULES = ("own", "shrunk", "shared")


def chains(count: int, seed: int) -> Tensor:
    """Sequences of a fixed sparse chain in four dialects."""
    rows = np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.05), (4, VOCAB))
    draw = np.random.default_rng(seed)
    found = np.zeros((count, T), np.int64)
    for one in found:
        dialect, token = draw.integers(4), draw.integers(VOCAB)
        for t in range(T):
            one[t] = token
            token = draw.choice(VOCAB, p=rows[dialect, token])
    return torch.from_numpy(found)


def trained() -> Qwen3MoeForCausalLM:
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=T,
        output_router_logits=False,
    )
    model = Qwen3MoeForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    corpus = chains(1024, 1)
    for step in range(150):
        batch = corpus[torch.arange(step * 64, step * 64 + 64) % len(corpus)]
        loss = model(batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"trained to {loss.item():.2f} nats a token", flush=True)
    model.set_experts_implementation("eager")
    return model.double().eval()


class Products(TorchFunctionMode):
    """Every product with an expert's weight, by stack and expert: its inputs and outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.experts = {
            weight[expert].data_ptr(): (name, expert)
            for name, weight in model.named_parameters()
            if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
            for expert in range(EXPERTS)
        }
        self.seen: list[tuple[tuple[str, int], Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is linear and args[1].data_ptr() in self.experts:
            self.seen.append((self.experts[args[1].data_ptr()], args[0].detach(), out))
        return out


Tokens = dict[tuple[str, int], tuple[Tensor, Tensor]]


def tokens_of(model: torch.nn.Module, ids: Tensor, sampled: torch.Generator | None) -> Tokens:
    """(a, s) of one sequence's tokens by expert; labels drawn from the model, or the sequence's own."""
    with Products(model) as products:
        logits = model(ids[None]).logits[0]
    if sampled is not None:
        labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=sampled)[:, 0]
        loss = cross_entropy(logits, labels, reduction="sum")
    else:
        loss = cross_entropy(logits[:-1], ids[1:], reduction="sum")
    gradients = torch.autograd.grad(loss, [out for *_, out in products.seen])
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (expert, a, _), s in zip(products.seen, gradients, strict=True):
        found[expert].append((a, s))
    return {expert: (torch.cat([a for a, _ in x]), torch.cat([s for _, s in x])) for expert, x in found.items()}


def fitted(of_sequences: list[Tokens], rule: str) -> dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, float]]:
    """Q_A, Q_S, Lambda and damping by expert."""
    found = {}
    for stack in sorted({stack for each in of_sequences for stack, _ in each}):
        sides: dict[int, list[Tensor]] = {}
        for kind in (0, 1):
            mine = {e: [one[stack, e][kind] for one in of_sequences if (stack, e) in one] for e in range(EXPERTS)}
            every = torch.cat([x for parts in mine.values() for x in parts])
            n, mean = every.shape[1], every.T @ every / len(every)
            for expert, parts in mine.items():
                own = torch.cat([every[:0], *parts])
                total = {
                    "own": own.T @ own / max(len(own), 1),
                    "shrunk": (own.T @ own + n * mean) / (len(own) + n),
                    "shared": mean,
                }[rule]
                sides.setdefault(expert, []).append(torch.linalg.eigh(total)[1])
        Lambda = {}
        for expert, (Q_A, Q_S) in sides.items():
            squares = [
                (Q_S.T @ (one[stack, expert][1].T @ one[stack, expert][0]) @ Q_A) ** 2
                for one in of_sequences
                if (stack, expert) in one
            ]
            Lambda[expert] = sum(squares, torch.zeros(len(Q_S), len(Q_A))) / len(of_sequences)
        lam = 0.1 * float(torch.stack(list(Lambda.values())).mean())
        found |= {(stack, e): (*sides[e], Lambda[e], lam) for e in sides}
    return found


def scores(factors, asked: list[Tokens], sequences: list[Tokens]) -> np.ndarray:  # type: ignore[no-untyped-def]
    """[Q, N]."""
    found = np.zeros((len(asked), len(sequences)))
    for expert, (Q_A, Q_S, Lambda, lam) in factors.items():
        for q, query in enumerate(asked):
            if expert not in query:
                continue
            a, s = query[expert]
            P = Q_S @ ((Q_S.T @ (s.T @ a) @ Q_A) / (Lambda + lam)) @ Q_A.T
            for n, one in enumerate(sequences):
                if expert in one:
                    found[q, n] += float(((one[expert][1] @ P) * one[expert][0]).sum())
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_default_dtype(torch.float32)
    model = trained()
    torch.set_default_dtype(torch.float64)
    labels = torch.Generator().manual_seed(0)
    fit = [tokens_of(model, ids, labels) for ids in chains(400, 2)]
    sequences = [tokens_of(model, ids, None) for ids in chains(60, 3)]
    asked = [tokens_of(model, ids, None) for ids in chains(4, 4)]
    reference = scores(fitted(fit, "own"), asked, sequences)
    for count in (4, 16, 64):
        some = fit[-count:]
        seen = sorted(sum(len(one[key][0]) for one in some if key in one) for key in {k for one in fit for k in one})
        print(
            f"{count} sequences; an expert's tokens: {seen[0]} to {seen[-1]}, median {int(np.median(seen))}", flush=True
        )
        for rule in RULES:
            found = scores(fitted(some, rule), asked, sequences)
            r = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(found, reference, strict=True)]
            print(f"    {rule:7} {np.mean(r):.3f} (least {min(r):.3f})", flush=True)


if __name__ == "__main__":
    main()
