"""Trains the small mixture of experts that tests and benchmarks use, in ten minutes of one core.

    apt-get download dict-jargon debian-handbook    # then: dpkg -x FILE DIRECTORY
    python tests/data/train_small_moe.py --out DIRECTORY --dictionary .../dictd --handbook .../debian-handbook/html

A byte-level BPE tokenizer and a Qwen3-MoE with fused experts are trained from nothing on the six domains of
``moe_texts``. Each step takes as many sequences of one domain as of another. Next to the cross-entropy stands a
load-balancing loss (Fedus, Zoph, Shazeer 2022, arXiv:2101.03961, equations 4 to 6) of each layer over the whole batch,
not over each sequence: every expert has to be used, but not by every domain (Qiu et al. 2025, arXiv:2501.11873). Seeds
are fixed; another number of threads, version of torch or of Python gives slightly other weights.

What is written: the model in bfloat16, its tokenizer, extracts of the held-out documents, and ``figures.json``.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from byte_model import measure_bits_per_byte
from expert_usage import (
    equal_routing,
    measure_loss,
    measure_usage,
    mutual_information_bits,
    random_routers,
    shuffled_routing,
)
from extracts import count_bytes, cut_sequences, encode, read_extracts, write_extracts
from moe_texts import Documents, read_domains
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY_SIZE = 1024
TOKENIZER_CHARACTERS = 500_000  # of each domain
EVALUATED_SEQUENCES = 128  # at most, of each domain


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the weights.

    Args:
        steps: Number of steps.
        sequences: Sequences of each domain in a step.
        sequence_tokens: Length of a sequence.
        learning_rate: Its highest value.
        warmup: Number of steps in which it rises.
        decay: Share of the steps in which it falls.
        weight_decay: Of the matrices.
        balance: Factor of the load-balancing loss of a layer.
        seed: Of weights and batches.
    """

    steps: int = 2200
    sequences: int = 2
    sequence_tokens: int = 256
    learning_rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 0.1
    balance: float = 0.01
    seed: int = 0


def build_tokenizer(documents: Mapping[str, Documents]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on equal amounts of all domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["\n".join(parts["training"])[:TOKENIZER_CHARACTERS] for parts in documents.values()]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build_model(seed: int) -> Qwen3MoeForCausalLM:
    """Returns the untrained model: four layers of sixteen experts, two of them for each token."""
    torch.manual_seed(seed)
    # Not among the declared fields of the configuration, yet read from it by the attention.
    head: dict[str, Any] = {"head_dim": 32}
    config = Qwen3MoeConfig(
        **head,
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return Qwen3MoeForCausalLM(config)


def balance_loss(router_logits: Sequence[Tensor], experts_per_token: int) -> Tensor:
    """Returns E sum_e f_e P_e, the mean over layers: 1 where all experts get the same load, up to E where one does.

    Args:
        router_logits: One a layer [tokens, E].
        experts_per_token: Number of experts that a token is sent to.
    """
    losses = []
    for logits in router_logits:
        chosen = logits.topk(experts_per_token, dim=-1).indices.flatten()
        share = chosen.bincount(minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (share * logits.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(losses).mean()


def train_(
    model: Any, streams: Mapping[str, Tensor], held_out: Mapping[str, Tensor], training: Training, out: Path
) -> None:
    """Trains the model in place, and writes it from time to time.

    Args:
        model: The model.
        streams: Domain -> all tokens of its training documents.
        held_out: Domain -> sequences whose loss is printed on the way.
        training: How.
        out: Directory that holds the model as far as it is trained.
    """
    optimizer = _build_optimizer(model, training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, training))
    generator = torch.Generator().manual_seed(training.seed)
    started = time.perf_counter()
    for step in range(1, training.steps + 1):
        batch = _draw_batch(streams, training, generator)
        output = model(batch, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + training.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            nats = {domain: f"{measure_loss(model, tokens).mean():.3f}" for domain, tokens in held_out.items()}
            _say(
                f"step {step}, {time.perf_counter() - started:.0f} s: loss {loss:.3f}, balance {balance:.3f}, "
                f"gradient {norm:.2f}, held out {nats}"
            )
            model.save_pretrained(out)


def measure_figures(
    model: Any, tokenizer: PreTrainedTokenizerFast, documents: Mapping[str, Documents]
) -> dict[str, Any]:
    """Returns what the model reaches on the evaluation documents, and how it uses its experts."""
    sequences = {
        name: _take_evenly(cut_sequences(encode(tokenizer, parts["evaluation"]), Training.sequence_tokens))
        for name, parts in documents.items()
    }
    usage = measure_usage(model, sequences)
    with random_routers(model, seed=0):
        random_usage = measure_usage(model, sequences)
    return {
        "domains": {name: _measure_domain(model, tokenizer, sequences[name], documents[name]) for name in sequences},
        "mutual_information_bits": mutual_information_bits(usage).tolist(),
        "mutual_information_bits_random_routers": mutual_information_bits(random_usage).tolist(),
        "least_expert_share": usage.mean(dim=0).min().item(),
        "usage": {name: usage[i].tolist() for i, name in enumerate(sequences)},
    }


def measure_extracts(model: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> dict[str, float]:
    """Returns domain -> loss in nats per token of the extracts that a file holds."""
    extracts = read_extracts(path)
    sequences = {
        name: cut_sequences(encode(tokenizer, texts), Training.sequence_tokens) for name, texts in extracts.items()
    }
    return {name: measure_loss(model, part).mean().item() for name, part in sequences.items()}


def _measure_domain(
    model: Any, tokenizer: PreTrainedTokenizerFast, sequences: Tensor, documents: Documents
) -> dict[str, float]:
    row: dict[str, float] = {
        "tokens": sequences.numel(),
        "nats_per_token": measure_loss(model, sequences).mean().item(),
    }
    others = {
        "shuffled_routing": shuffled_routing(model, seed=0),
        "equal_routing": equal_routing(model),
        "random_routers": random_routers(model, seed=0),
    }
    for name, routing in others.items():
        with routing:
            row[f"nats_per_token_{name}"] = measure_loss(model, sequences).mean().item()
    predicted = sequences[:, 1:]
    length_bytes = count_bytes(tokenizer, predicted)
    row["bits_per_byte"] = row["nats_per_token"] / math.log(2) * predicted.numel() / length_bytes
    row["bits_per_byte_of_3_byte_history"] = measure_bits_per_byte(documents["training"], documents["evaluation"])
    return row


def _take_evenly(sequences: Tensor) -> Tensor:
    count = min(len(sequences), EVALUATED_SEQUENCES)
    return sequences[torch.linspace(0, len(sequences) - 1, count).round().long()]


def main() -> None:
    options = _read_options()
    training = Training(steps=options.steps, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    documents = read_domains(options.dictionary, options.handbook)
    tokenizer = build_tokenizer(documents)
    streams = {name: encode(tokenizer, parts["training"]) for name, parts in documents.items()}
    _say(f"training tokens: { {name: len(stream) for name, stream in streams.items()} }")
    held_out = {
        name: cut_sequences(encode(tokenizer, parts["calibration"]), training.sequence_tokens)[:12]
        for name, parts in documents.items()
    }
    model = build_model(training.seed).train()
    train_(model, streams, held_out, training, options.out)
    seconds = time.process_time()
    model = model.bfloat16().eval()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for part in ("calibration", "evaluation"):
        write_extracts({name: parts[part] for name, parts in documents.items()}, options.out / f"{part}.jsonl")
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": asdict(training),
        "training_processor_seconds": round(seconds),
        "training_tokens": {name: len(stream) for name, stream in streams.items()},
        # What is stored is what is judged: the rounded weights, computed with in float32.
        **measure_figures(model.float(), tokenizer, documents),
        "extract_nats_per_token": measure_extracts(model, tokenizer, options.out / "evaluation.jsonl"),
    }
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small mixture of experts.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--dictionary", type=Path, default=Path("/usr/share/dictd"), help="of dict-jargon")
    parser.add_argument("--handbook", type=Path, default=Path("/usr/share/doc/debian-handbook/html"))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--seed", type=int, default=Training.seed)
    return parser.parse_args()


def _build_optimizer(model: Any, training: Training) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98), fused=True)


def _draw_batch(streams: Mapping[str, Tensor], training: Training, generator: torch.Generator) -> Tensor:
    rows: list[Tensor] = []
    for stream in streams.values():
        last = len(stream) - training.sequence_tokens
        starts = torch.randint(0, last + 1, (training.sequences,), generator=generator)
        rows.extend(stream[start : start + training.sequence_tokens] for start in starts.tolist())
    return torch.stack(rows)


def learning_rate_factor(step: int, training: Training) -> float:
    """Returns the share of the highest learning rate: up in a line, level, down in a line to zero."""
    decay = round(training.steps * training.decay)
    return min(1.0, (step + 1) / training.warmup, (training.steps - step) / decay)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
