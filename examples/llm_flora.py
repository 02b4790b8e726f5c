"""FLoRA and LoRA on a real language model: what they learn, what they forget.

    python examples/llm_flora.py
    python examples/llm_flora.py --methods flora lora --seeds 0 --max_steps 40

On a CPU with glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment
makes it several times faster on a busy machine.

SmolLM2-135M-Instruct learns to turn sentences about shipments into entries of a waybill book, a
task that is generated (`embedded/waybills.py`) and that it cannot do before. An entry counts as
right when greedy decoding gives every character of it. Names, goods and towns asked about are in no
training sentence. What was forgotten is measured on what has nothing to do with waybills: the loss
on a text, Python's language reference, and the answers to questions of all kinds, token by token
against those of the base model.

Each batch also has questions on other topics, with the base model's answers, in which nothing is to
be learnt: without a regularizer they do nothing. In the runs with `distillation`,
`graftune.FrozenDistillation` keeps the model there, and in the sentences to be entered, where it
was: `graftune.CausalLM(compared="unlabelled")` compares all tokens that have no label. The frozen
model is the same model with its adapter off.

LoRA has the rank at which it trains the closest number of parameters. Results are written after
each run, and a run that is there is not made again. Every option of
`transformers.TrainingArguments` is accepted as well.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, TrainingArguments

import graftune
from embedded.general_text import questions, reference_text
from embedded.results import Results, console, table
from embedded.smollm2 import load_smollm2
from embedded.waybills import waybills_task
from graftune.integrations.data.tokens import encode, windows
from graftune.integrations.objectives.labels import IGNORED

Tokens = dict[str, list[int]]  # input_ids and labels

METHODS = ("flora", "lora", "flora + distillation", "lora + distillation")
COLUMNS = {
    "trained": ",.0f",
    "accuracy": ".1f",
    "loss": ".3f",
    "text loss": ".3f",
    "same token": ".1f",
    "same answer": ".1f",
    "KL": ".3f",
    "seconds": ".0f",
}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What to compare, on what."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Which of {', '.join(METHODS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each chooses the sentences and all else by chance."},
    )
    rates: list[float] = field(default_factory=lambda: [3e-3], metadata={"help": "Learning rates."})
    weight: float = option(1.0, "Weight of the distillation.")
    split: str = option("test", "What to ask about: test, or validation to choose settings.")
    rank: int = option(8, "FLoRA's rank; LoRA's follows from it.")
    sentences: int = option(240, "Training sentences.")
    rehearsal: int = option(60, "Questions among them in which nothing is to be learnt.")
    held_out: int = option(150, "Sentences to ask about.")
    questions: int = option(240, "Questions of all kinds to ask.")
    windows: int = option(40, "Pieces of text of 64 tokens.")
    results: str = option("outputs/llm_flora/results.json", "Where the results are kept.")


@dataclass
class Training(TrainingArguments):
    """transformers' training arguments, with defaults for this task."""

    output_dir: str = option("outputs/llm_flora", "Where the trainer may write.")
    max_steps: int = 60
    per_device_train_batch_size: int = 5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_strategy: str = "no"
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


def rows_of(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[Tokens]:
    """Return prompts with completions as tokens; only the completions have labels."""
    return [dict(zip(("input_ids", "labels"), encode(row, tokenizer), strict=True)) for row in rows]


def text_rows(tokenizer: Any, count: int, size: int = 64) -> list[Tokens]:
    """Return pieces of Python's language reference, from all over it."""
    pieces = windows(encode({"text": reference_text()}, tokenizer), size)
    chosen = pieces[:: len(pieces) // count][:count]
    return [{"input_ids": ids, "labels": labels} for ids, labels in chosen]


@torch.no_grad()
def answered(
    model: Any, tokenizer: Any, texts: Sequence[str], length: int = 12, size: int = 20
) -> list[Tokens]:
    """Return the questions, and as labels the first tokens of the model's answers."""
    rows = []
    for start in range(0, len(texts), size):
        chats = [[{"role": "user", "content": text}] for text in texts[start : start + size]]
        prompts = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)
        whole = model.generate(**prompts, max_new_tokens=length, do_sample=False)
        for ids, mask in zip(whole.tolist(), prompts["attention_mask"], strict=True):
            rows.append(_labelled(ids, len(mask), int(mask.sum()), tokenizer.eos_token_id))
    return rows


def _labelled(ids: list[int], padded: int, asked: int, end: int) -> Tokens:
    """Cut the padding before a question and after its answer; the answer alone has labels."""
    question, answer = ids[padded - asked : padded], ids[padded:]
    if end in answer:
        answer = answer[: answer.index(end) + 1]
    return {"input_ids": question + answer, "labels": [IGNORED] * asked + answer}


@torch.no_grad()
def log_probabilities(
    model: Any, rows: Sequence[Tokens], collate: Any, size: int = 20
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the model says where there are labels, (T, V), and these labels, (T,), by row."""
    model.eval()
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size]).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for logit, label in zip(logits[:, :-1], batch["labels"][:, 1:], strict=True):
            asked = label != IGNORED
            yield F.log_softmax(logit[asked].float(), dim=-1).cpu(), label[asked].cpu()


def task_scores(model: Any, rows: Sequence[Tokens], collate: Any) -> dict[str, float]:
    """Return the mean loss a token, and the share of rows that greedy decoding gets right, in %."""
    loss, right, tokens = 0.0, 0, 0
    for said, labels in log_probabilities(model, rows, collate):
        loss += F.nll_loss(said, labels, reduction="sum").item()
        tokens += len(labels)
        # With all tokens before it right, each is what greedy decoding would go on with.
        right += bool((said.argmax(-1) == labels).all())
    return {"loss": loss / tokens, "accuracy": 100 * right / len(rows)}


def answer_scores(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    """Compare answers, each (T, V), with those of the base model.

    Returns:
        The share of tokens and of whole answers that are the same, in %, and the mean over tokens
        of KL(before ‖ after), in nats.
    """
    pairs = list(zip(before, after, strict=True))
    same = [old.argmax(-1) == new.argmax(-1) for old, new in pairs]
    divergence = [
        F.kl_div(new, old, reduction="none", log_target=True).sum(-1) for old, new in pairs
    ]
    return {
        "same token": 100 * torch.cat(same).double().mean().item(),
        "same answer": 100 * torch.stack([s.all() for s in same]).double().mean().item(),
        "KL": torch.cat(divergence).mean().item(),
    }


def attach(method: str, rank: int) -> Any:
    """Return the pretrained model with an adapter."""
    model, _ = load_smollm2()
    return graftune.wrap(model, LoraConfig() if method == "lora" else method, r=rank)


def trained_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def closest_lora_rank(rank: int) -> int:
    """Return the rank at which LoRA trains the closest number of parameters to FLoRA's."""
    flora, lora = (trained_parameters(attach(*pair)) for pair in (("flora", rank), ("lora", 1)))
    return max(1, round(flora / lora))


@dataclass
class Comparison:
    """What all runs have in common."""

    options: Options
    args: TrainingArguments

    def __post_init__(self) -> None:
        options = self.options
        model, self.tokenizer = load_smollm2()
        model.to(self.args.device)
        self.collate = DataCollatorForSeq2Seq(self.tokenizer, return_tensors="pt")
        task = waybills_task(held_out=options.held_out)
        self.asked = rows_of(getattr(task, options.split), self.tokenizer)
        self.text = text_rows(self.tokenizer, options.windows)
        self.answers = answered(model, self.tokenizer, questions("asked")[: options.questions])
        others = answered(model, self.tokenizer, questions("rehearsal")[: options.rehearsal])
        self.rehearsal = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in others]
        self.said = [said for said, _ in log_probabilities(model, self.answers, self.collate)]
        self.base = self.scores(model)
        self.ranks = {"flora": options.rank, "lora": closest_lora_rank(options.rank)}

    def scores(self, model: Any) -> dict[str, float]:
        """Return what a model can do of the task, and what it still says as the base model does."""
        said = [said for said, _ in log_probabilities(model, self.answers, self.collate)]
        return {
            **task_scores(model, self.asked, self.collate),
            "text loss": task_scores(model, self.text, self.collate)["loss"],
            **answer_scores(self.said, said),
        }

    def run(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Train by one method, and return what it gained and what it forgot."""
        adapter, _, regularizer = method.partition(" + ")
        weight = self.options.weight
        transformers.set_seed(seed)
        sentences = waybills_task(seed, self.options.sentences).train
        model = attach(adapter, self.ranks[adapter])
        trainer = graftune.Trainer(
            model,
            dataclasses.replace(self.args, seed=seed, learning_rate=rate),
            objective=graftune.CausalLM(compared="unlabelled"),
            regularizers=[graftune.FrozenDistillation(weight)] if regularizer else [],
            train_dataset=rows_of(sentences, self.tokenizer) + self.rehearsal,
            data_collator=self.collate,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        return {
            "method": method,
            "rank": self.ranks[adapter],
            "rate": rate,
            "seed": seed,
            "trained": trained_parameters(model),
            **self.scores(model),
            "seconds": seconds,
        }


def settings_of(options: Options, args: TrainingArguments) -> dict[str, Any]:
    """Return what all rows of the results have in common."""
    own = {"methods", "seeds", "rates", "results"}
    common = {k: v for k, v in dataclasses.asdict(options).items() if k not in own}
    return {**common, "steps": args.max_steps, "batch": args.per_device_train_batch_size}


def main() -> None:
    options, args = HfArgumentParser((Options, Training)).parse_args_into_dataclasses()
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    say = console().print
    results = Results(Path(options.results), settings_of(options, args))
    comparison = Comparison(options, args)
    base = {"method": "base model", "rank": None, "rate": None, "seed": None, "trained": 0}
    if not results.has(method="base model"):
        results.add({**base, **comparison.base, "seconds": 0.0})
    for seed, method, rate in product(options.seeds, options.methods, options.rates):
        if not results.has(method=method, rate=rate, seed=seed):
            results.add(comparison.run(method, rate, seed))
            say(results.rows[-1])
    title = f"{args.max_steps} steps of {args.per_device_train_batch_size}; {options.split} split"
    say(table(title, results.rows, ("method", "rank", "rate"), COLUMNS))
    say(f"Written to {options.results}")


if __name__ == "__main__":
    # Of PEFT's making, for transformers' developers.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.utils.logging.disable_progress_bar()
    main()
