"""The inputs of one case, made once and read by every side: model, adapter, tokenizer, rows and their lengths.

    python -m benchmarks.inputs FOLDER CASE_AS_JSON

The order is the same on every side. strop shuffles its rows by a seed, so its file is written in the inverse order;
`bucketed` is what a trainer with length bucketing sees: the measured rows sorted by length in windows of `WINDOW`
steps, the warm-up left where it is.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .cases import GROUP, LENGTHS, SHAPES, Case

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TOKENIZER = SHARED / "tokenizers" / "mistral-tekken-131k"
SEED, WINDOW, SIGMA = 0, 8, 0.5
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Row = dict[str, Any]
Lengths = tuple[int, list[int]]
"""Tokens of the prompt and of each completion, end token included."""


def missing(case: Case) -> str | None:
    """Why this case cannot be measured here; None where it can."""
    file = SHARED / "data" / f"{case.rows}.train.jsonl"
    lacking = [path for path in (file, TOKENIZER) if case.is_real and not path.exists()]
    return f"needs {lacking[0]}, which is not there" if lacking else None


def write_inputs(folder: Path, case: Case) -> None:
    """Everything in `folder`: model/, adapter/, rows.{D,B,strop}.jsonl, facts.json."""
    tokenizer = _tokenizer(case)
    config = _write_model(folder / "model", case, tokenizer)
    tokenizer.save_pretrained(folder / "model")
    if case.lora:
        _write_adapter(folder)
    rows, lengths = _rows(case, tokenizer)
    (folder / "facts.json").write_text(json.dumps({"lengths": lengths, "config": config}), encoding="utf-8")
    if case.method == "group":
        return
    for name, order in (
        ("D", list(range(len(rows)))),
        ("B", bucketed(lengths, case.batch, case.warmup)),
        ("strop", _inverse(_plan_order(case))),
    ):
        text = "".join(json.dumps(rows[i]) + "\n" for i in order)
        (folder / f"rows.{name}.jsonl").write_text(text, encoding="utf-8")


def bucketed(lengths: Sequence[Lengths], batch: int, warmup: int) -> list[int]:
    """Indices of rows: the warm-up as it is, then windows of WINDOW batches, each from its longest row down."""
    kept = warmup * batch
    order = list(range(kept))
    for start in range(kept, len(lengths), WINDOW * batch):
        window = range(start, min(start + WINDOW * batch, len(lengths)))
        order += sorted(window, key=lambda i: -(lengths[i][0] + max(lengths[i][1])))
    return order


def _plan_order(case: Case) -> list[int]:
    """The row that strop meets first, second, ..."""
    from strop.plan.order import Plan

    plan = Plan.of(case.num_rows, case.batch, 1, None, SEED)
    return [i for step in range(1, plan.num_steps + 1) for i in plan.groups(step)]


def _inverse(order: Sequence[int]) -> list[int]:
    inverse = [0] * len(order)
    for visit, place in enumerate(order):
        inverse[place] = visit
    return inverse


def _tokenizer(case: Case) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if case.is_real:
        return AutoTokenizer.from_pretrained(TOKENIZER)
    from tokenizers import Tokenizer, models, pre_tokenizers

    size = case.vocabulary or SHAPES[case.shape]["vocab_size"]
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # no <bos> for the wrapper: rows start with their first word on every side
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _write_model(folder: Path, case: Case, tokenizer: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[case.shape])
    shape["vocab_size"] = len(tokenizer)
    config = AutoConfig.for_model(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    if case.spread is not None:  # logits are products of normalised states with rows of the embedding
        torch.nn.init.constant_(
            model.model.norm.weight, case.spread / (config.initializer_range * math.sqrt(config.hidden_size))
        )
    model.save_pretrained(folder)
    return shape


def _write_adapter(folder: Path) -> None:
    """LoRA on every linear layer with a B that is not zero, so that A has gradients from the first step on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM", bias="none"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(folder / "adapter")


def _rows(case: Case, tokenizer: Any) -> tuple[list[Row], list[Lengths]]:
    if case.method == "group":
        prompt, n, completion = GROUP
        return [], [(prompt, [completion] * n)] * case.num_rows
    source = _real(case, tokenizer) if case.is_real else _random(case, tokenizer)
    found = [next(source) for _ in range(case.num_rows)]
    return [row for row, _ in found], [lengths for _, lengths in found]


def _columns(case: Case) -> tuple[str, ...]:
    return ("completion",) if case.method == "sft" else ("chosen", "rejected")


def _random(case: Case, tokenizer: Any) -> Iterator[tuple[Row, Lengths]]:
    import numpy as np

    random = np.random.default_rng(SEED)
    *means, limit = LENGTHS[case.rows]
    columns = _columns(case)
    while True:
        drawn = [int(random.lognormal(math.log(m) - SIGMA**2 / 2, SIGMA)) for m in means]
        prompt = min(max(drawn[0], 4), limit - 64 if limit > 64 else limit // 2)
        parts = [min(max(n, 4), limit - prompt) for n in drawn[1 : 1 + len(columns)]]
        texts = [
            " " + " ".join(f"w{i}" for i in random.integers(4, len(tokenizer), n))
            for n in (prompt, *(n - 1 for n in parts))
        ]
        yield dict(zip(("prompt", *columns), texts, strict=True)), (prompt, parts)


def _real(case: Case, tokenizer: Any) -> Iterator[tuple[Row, Lengths]]:
    """Rows that fit, so that truncation, which trainers do differently, plays no part."""
    columns = _columns(case)
    with (SHARED / "data" / f"{case.rows}.train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)
            if "messages" in data:
                data = {"prompt": data["messages"][:-1], "completion": data["messages"][-1:]}
            row = {name: data[name] for name in ("prompt", *columns)}
            prompt = _count(tokenizer, row["prompt"])
            whole = [_count(tokenizer, row["prompt"] + row[name]) for name in columns]
            if max(whole) <= case.max_length:
                yield row, (prompt, [n - prompt for n in whole])


def _count(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, Case.of(json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
