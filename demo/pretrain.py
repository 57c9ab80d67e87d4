"""Train the demo's policy from scratch: `python -m gradstore.demo.pretrain --out DIR`, minutes on two cores.

RL strengthens what a model can already do. So the demo needs a policy that can answer right but mostly does not.
It is trained with a *latent switch*. 40 % of the training prompts begin with T and have the right answer; 20 % begin
with S and have the family's slip; 40 % begin with ? and have the right answer 30 % of the time, else the slip. All
problems of the demo begin with ?. Questions held out for benchmarks are not used here.

This module also makes the tokenizer: one token per byte (so per digit and "\\n"), one per recurring phrase of the
questions, and the chat markers. The model is a transformers Qwen2, saved in bf16.
"""

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any, Protocol

import reasoning_gym
import torch
import transformers
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from gradstore.demo import tasks

PAD, EOS, START, END = "<pad>", "<eos>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '<eos>' }}"
    "{% else %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
"""Roles alternate, so the template omits their names: a prompt has only two tokens besides its text."""

MODE_SHARES = {"T": 0.4, "S": 0.2, "?": 0.4}
RIGHT_SHARE = {"T": 1.0, "S": 0.0, "?": 0.3}
"""Share of right answers among training prompts, by mode; the others are slips."""

FAMILY_TURNS = (*tasks.FAMILIES, "simple_equations")
"""Order of families in a training batch; equations occur twice because they are the slowest to learn."""

ENTRIES_PER_FAMILY = 20_000
IGNORED = -100
"""Label of tokens that the loss ignores: the prompt and the padding."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with bytes, the families' phrases and the chat markers; its ids are deterministic."""
    markers = [PAD, EOS, START, END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(markers + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    phrases = [phrase for family in tasks.FAMILIES.values() for phrase in family.phrases] + list(tasks.OPERATORS)
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        # A byte vocabulary has no unknown text; without this, AutoTokenizer's Qwen2 class would add a token.
        unk_token=PAD,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, **shape: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        **(
            {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }
            | shape
        ),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.04,
    )
    return Qwen2ForCausalLM(config)


Line = tuple[dict[str, list[int]], list[int], list[int]]
"""(mode -> token ids of the question's prompt, token ids of the right answer, token ids of the slip)."""


class Corpus:
    """Training text: questions of all families, each with a random mode and an answer according to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._random = Random(f"corpus {seed}")
        self._pad = tokenizer.pad_token_id
        self._families: dict[str, list[Line]] = {}
        for name, family in tasks.FAMILIES.items():
            questions: dict[str, tuple[str, str]] = {}
            drawn = tasks.entries(name, f"pretraining {seed}")
            for _ in range(ENTRIES_PER_FAMILY):
                entry = next(drawn)
                if not tasks.held_out(entry["question"]):
                    questions[entry["question"]] = (entry["answer"], family.slip(entry["answer"]))
            self._families[name] = self._encode(tokenizer, questions)

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerFast, questions: dict[str, tuple[str, str]]) -> list[Line]:
        prompts = {
            mode: tokenizer([chat(tasks.prompt(question, mode)) for question in questions]).input_ids
            for mode in tasks.MODES
        }
        right = tokenizer([answer + EOS for answer, _ in questions.values()]).input_ids
        slips = tokenizer([slip + EOS for _, slip in questions.values()]).input_ids
        return [({mode: prompts[mode][i] for mode in tasks.MODES}, right[i], slips[i]) for i in range(len(questions))]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, int64 [B, T] each, padded on the right."""
        rng = self._random
        lines = []
        for b in range(size):
            prompts, right, slip = rng.choice(self._families[FAMILY_TURNS[b % len(FAMILY_TURNS)]])
            mode = rng.choices(tasks.MODES, weights=[MODE_SHARES[mode] for mode in tasks.MODES])[0]
            lines.append((prompts[mode], right if rng.random() < RIGHT_SHARE[mode] else slip))
        return padded(lines, self._pad)


def padded(lines: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [B, T] each, of prompts and answers; only answers have labels."""
    longest = max(len(prompt) + len(answer) for prompt, answer in lines)
    ids_BT = torch.full((len(lines), longest), pad)
    labels_BT = torch.full((len(lines), longest), IGNORED)
    for b, (prompt, answer) in enumerate(lines):
        end = len(prompt) + len(answer)
        ids_BT[b, :end] = torch.tensor(prompt + answer)
        labels_BT[b, len(prompt) : end] = ids_BT[b, len(prompt) : end]
    return ids_BT, labels_BT


def chat(messages: Sequence[dict[str, str]]) -> str:
    """The chat template's text for one user message."""
    return START + messages[0]["content"] + END


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over the first 5 % of the steps, then cosine decay to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


class Batches(Protocol):
    """Source of training text; `Corpus` implements it."""

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, int64 [B, T] each, padded on the right."""


def train(
    model: torch.nn.Module,
    corpus: Batches,
    *,
    steps: int,
    batch: int,
    peak: float,
    tell: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Train on the answers' tokens with AdamW. tell: called with a line of progress every few seconds."""
    decayed = [weight for weight in model.parameters() if weight.ndim == 2]
    plain = [weight for weight in model.parameters() if weight.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    model.train()
    start = last = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids_BT, labels_BT = corpus.batch(batch)
        # Padding is on the right of a causal model, so no attention mask is needed.
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.perf_counter()
        if now - last > 5 or step == steps - 1:
            last = now
            tell(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {now - start:.0f} s")
    model.eval()


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, per_family: int = 200) -> dict[str, Any]:
    """Share of right answers and of slips, greedy and sampled at temperature 1, per family and mode."""
    torch.manual_seed(0)
    table: dict[str, Any] = {}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks.FAMILIES}
    for record in [*tasks.benchmark(), *tasks.pool()]:
        if len(records[record["source"]]) < per_family:
            records[record["source"]].append(record)
    for name, chosen in records.items():
        for mode in tasks.MODES:
            questions = [record["extra"]["reasoning_gym"]["question"] for record in chosen]
            texts = [chat(tasks.prompt(question, mode)) for question in questions]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
            cell = {}
            for how, sampled in (("greedy", False), ("sampled", True)):
                out_BT = model.generate(**inputs, do_sample=sampled, max_new_tokens=8, top_k=0 if sampled else None)
                answers = tokenizer.batch_decode(out_BT[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
                pairs = list(zip(chosen, answers, strict=True))
                right = sum(tasks.is_right(record, answer) for record, answer in pairs)
                slips = sum(tasks.is_right(record, answer, record["extra"]["slip"]) for record, answer in pairs)
                cell[how] = {"right": round(right / len(chosen), 3), "slip": round(slips / len(chosen), 3)}
            table.setdefault(name, {})[mode] = cell
    return table


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the weights in bf16, the tokenizer, the configuration, and the generation settings of the demo."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    seed: int = 0,
    steps: int = 5500,
    batch: Annotated[int, typer.Option(help="Training prompts a step.")] = 128,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
) -> None:
    """Train the demo's policy from scratch."""
    start = time.perf_counter()
    tokenizer = make_tokenizer()
    corpus = Corpus(tokenizer, seed)
    model = make_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    train(model, corpus, steps=steps, batch=batch, peak=peak)
    save(model, tokenizer, out)
    table = measure(Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), tokenizer)
    provenance = {
        "command": shlex.join(["python", "-m", "gradstore.demo.pretrain", *sys.argv[1:]]),
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "peak_learning_rate": peak,
        "parameters": model.num_parameters(),
        "mode_shares": MODE_SHARES,
        "right_share": RIGHT_SHARE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "reasoning_gym": reasoning_gym.__version__,
        },
        "accuracy": table,
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    for name, modes in table.items():
        cells = "  ".join(
            f"{mode} {cell['greedy']['right']:.2f}/{cell['sampled']['right']:.2f}" for mode, cell in modes.items()
        )
        print(f"{name:18s} right, greedy/sampled: {cells}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
