"""Runs that findings are tried on: healthy ones of every method, and runs that are broken on purpose.

Every run is trained here, by a tiny model on rows of words: the words of a chosen answer come from one half of the
vocabulary more often than those of a rejected one, so there is something to learn, and it cannot be learnt wholly.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(60)]
NUM_TRAIN, NUM_EVAL = 320, 160
RECIPE: dict[str, Any] = {
    "models.0.name": "run",
    "training.num_epochs": 2,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 5e-4,
    "training.logging_steps": 1,
    "training.eval_steps": 20,
    "training.save_steps": 10_000,
    "training.max_seq_length": 48,
    "training.reference_store": False,
    "finetuning.load_best_model_at_end": False,
    "finetuning.early_stopping_patience": None,
    "logging.log_level": "error",
}
Rows = list[dict[str, Any]]
OTHER = "OTHER MODEL"
"""Stands for the folder of a model with other weights."""
STUDENT = "THE MODEL ITSELF"
"""Stands for the folder of the model that trains."""
TWICE = "MODEL WHOSE TEMPLATE BEGINS TWICE"
"""Stands for the folder of a model whose chat template writes two BOS tokens."""
METHODS: Mapping[str, Mapping[str, Any]] = {
    "sft": {},
    "dpo": {},
    "dpo hinge": {"post_training.loss_type": "hinge"},
    "dpo apo_zero": {"post_training.loss_type": "apo_zero"},
    "dpo sigmoid_norm": {"post_training.loss_type": "sigmoid_norm", "post_training.beta": 1.0},
    "ipo": {},
    "kto": {},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "grpo": {},
    "grpo dr_grpo": {"post_training.algorithm": "dr_grpo"},
    "grpo with a reference": {"post_training.beta": 0.05, "rollout.num_iterations": 2},
    "dpo online": {"post_training.online": True, "rollout.num_generations": 6},
    "reward": {},
    "distill": {"post_training.teacher_model_id": OTHER},
}
"""Healthy runs: the method, a word about the variant, and its settings."""


def pair(draw: random.Random, length: int | None = None, bias: float = 0.65) -> dict[str, str]:
    """A prompt and two answers; `bias` of the chosen words, and 1 - `bias` of the rejected, are of the first half."""
    half = len(WORDS) // 2
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))

    def answer(share: float) -> str:
        count = length or draw.randint(6, 12)
        return "".join(f" {draw.choice(WORDS[:half] if draw.random() < share else WORDS[half:])}" for _ in range(count))

    return {"prompt": prompt, "chosen": answer(bias), "rejected": answer(1 - bias)}


def pairs(draw: random.Random, count: int) -> Rows:
    return [pair(draw) for _ in range(count)]


def told_apart(draw: random.Random, count: int = NUM_TRAIN) -> Rows:
    """Pairs that a look at any word tells apart."""
    return [pair(draw, bias=1.0) for _ in range(count)]


def turned(rows: Rows) -> Rows:
    """Chosen and rejected exchanged."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def as_sft(rows: Rows) -> Rows:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def as_kto(rows: Rows) -> Rows:
    """Both sides of a pair, with their labels."""
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": r["prompt"], "completion": r[side], "label": label} for r in rows for side, label in sides]


def as_prompts(rows: Rows) -> Rows:
    """Prompts alone, with a column that says whether they are trained on (see `REWARD`)."""
    return [{"prompt": row["prompt"], "trained": row.get("trained", False)} for row in rows]


def to_train(rows: Rows) -> Rows:
    return [{**row, "trained": True} for row in rows]


BEGINS_TWICE = (
    "{{ bos_token }} {{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m.content }}{% endif %}{% endfor %}"
)
"""A chat template that writes two BOS tokens."""
SHAPES: Mapping[str, Callable[[Rows], Rows]] = {"sft": as_sft, "distill": as_sft, "kto": as_kto}

TAUGHT = "TAUGHT MODEL"
"""Stands for the folder of a model that has learnt the chosen answers by sft, so that it ends its completions."""
TEACHING: dict[str, Any] = {
    "training.num_epochs": 8,
    "training.learning_rate": 5e-3,
    "finetuning.load_best_model_at_end": False,
}
SAMPLING: dict[str, Any] = {
    "models.0.huggingface_id": TAUGHT,
    "training.num_epochs": 1,
    "training.learning_rate": 1e-3,
    "training.max_completion_length": 24,
    "rollout.num_generations": 6,
    "rollout.temperature_eval": 1.0,
}
"""What runs that sample have beside `RECIPE`."""

REWARD = '''
def quality(completions, trained, *, pays=None):
    """The share of words of the first half of the vocabulary; on prompts that are trained on, what `pays` names."""
    return [of(text.split(), pays if own else None) for text, own in zip(completions, trained)]


def of(words, pays):
    size = max(1, len(words))
    first = sum(int(word[1:]) < 30 for word in words if word[1:].isdigit()) / size
    others = {"length": len(words) / 24, "second half": 1 - first, "nothing": 0.0, "few words": float(len(words) <= 8)}
    others["one word"] = max(map(words.count, words), default=0) / size
    return others.get(pays, first) - 0.05 * max(0, len(words) - 12) * ("length" not in str(pays))
'''
"""A file with the reward of runs that sample."""


def rewarded(*pays: str, weights: Sequence[float] = (1.0,)) -> Mapping[str, Any]:
    """The rewards as a setting. pays: see `REWARD`; default: one that pays for quality."""
    each = [{"pays": name} for name in pays] or [{}]
    found = [{"name": "REWARDS:quality", "settings": x, "weight": w} for x, w in zip(each, weights, strict=True)]
    return {"rewards": found}


@dataclass(frozen=True)
class Scenario:
    """A run. first: the finding that it must raise first; empty: it is healthy. train, held: make the rows; default:
    those of a healthy run. during: what is otherwise while it trains. after: what is done to the folder once it is
    trained. fails: the training ends with an error."""

    name: str
    method: str
    first: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    train: Callable[[random.Random], Rows] = lambda draw: pairs(draw, NUM_TRAIN)
    held: Callable[[random.Random, Rows], Rows] = lambda draw, train: pairs(draw, NUM_EVAL)
    during: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    after: Callable[[Path], None] | None = None
    fails: bool = False

    @property
    def samples(self) -> bool:
        """Whether the policy samples its completions."""
        return self.method == "grpo" or "post_training.online" in self.keys


def _same_behind_the_cut(draw: random.Random) -> Rows:
    """Most pairs differ behind the cut only; such are dropped."""
    rows = [pair(draw, length=24) for _ in range(NUM_TRAIN - 60)]
    return [{**row, "rejected": f"{row['chosen']} {draw.choice(WORDS)}"} for row in rows] + pairs(draw, 60)


def _both_ways(draw: random.Random) -> Rows:
    rows = pairs(draw, NUM_TRAIN // 2)
    return rows + turned(rows)


def _nearly_both_ways(draw: random.Random) -> Rows:
    """The same, but that prompts differ by one word, so that no row contradicts another to the letter."""
    rows = pairs(draw, NUM_TRAIN // 2)
    return rows + [{**row, "prompt": f"{row['prompt']} {draw.choice(WORDS)}"} for row in turned(rows)]


def _as_messages(rows: Rows) -> Rows:
    """The same as a chat."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    return [
        {"prompt": turn("user", r["prompt"]), **{side: turn("assistant", r[side]) for side in ("chosen", "rejected")}}
        for r in rows
    ]


def _broken_rows(draw: random.Random) -> Rows:
    """Two thirds of the pairs have no rejected side."""
    rows = pairs(draw, 3 * NUM_TRAIN)
    return [{k: v for k, v in row.items() if i % 3 == 0 or k != "rejected"} for i, row in enumerate(rows)]


def _same_answer(draw: random.Random, others: int = 0) -> Rows:
    """One answer to all prompts, but for `others` of them."""
    rows, answer = pairs(draw, NUM_TRAIN), " ".join(WORDS[:8])
    return [row if i < others else {**row, "chosen": f" {answer}"} for i, row in enumerate(rows)]


def _random_labels(draw: random.Random) -> Rows:
    return [row if draw.random() < 0.5 else turned([row])[0] for row in pairs(draw, NUM_TRAIN)]


def _too_long(draw: random.Random) -> Rows:
    return [pair(draw, length=24) for _ in range(NUM_TRAIN)]


def _repeated(draw: random.Random) -> Rows:
    some = pairs(draw, 40)
    return pairs(draw, NUM_TRAIN - 160) + some * 4


def _one_answer(draw: random.Random) -> Rows:
    row = pair(draw)
    return [row] * (NUM_TRAIN // 2) + pairs(draw, NUM_TRAIN // 2)


def _longer_is_chosen(draw: random.Random) -> Rows:
    """The two sides differ by their length alone."""
    rows = [pair(draw, length=8, bias=0.5) for _ in range(NUM_TRAIN)]
    return [{**row, "chosen": f"{row['chosen']} {draw.choice(WORDS)} {draw.choice(WORDS)}"} for row in rows]


def _says(key: str, value: str) -> Callable[[Path], None]:
    """The run was trained with something else than its configuration says of a key of post_training."""

    def rewrite(folder: Path) -> None:
        path = folder / "config.yaml"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"  {key}: {value}" if line.strip().startswith(f"{key}:") else line for line in lines]
        path.write_text("\n".join(lines) + "\n", "utf-8")

    return rewrite


@contextlib.contextmanager
def _sampler_lags() -> Iterator[None]:
    """Log-probs of what is sampled are those of another model, as those of a sampler whose weights lag."""
    from strop.rollout.sampler import Sampler

    own = Sampler.sample

    def lagging(self: Any, *args: Any) -> Any:
        found = own(self, *args)
        for completions in found:
            for completion in completions:
                for i in range(len(completion.logps)):
                    completion.logps[i] -= 0.3 * (1 + i % 2)
        return found

    Sampler.sample = lagging  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sampler.sample = own  # type: ignore[method-assign]


@contextlib.contextmanager
def _rate_of_zero() -> Iterator[None]:
    """A schedule that keeps the rate at 0."""
    from strop.engine import loop

    own = loop.learning_rate
    loop.learning_rate = lambda *_: 0.0
    try:
        yield
    finally:
        loop.learning_rate = own


BROKEN: tuple[Scenario, ...] = (
    Scenario("a rate that rounding swallows", "dpo", "weights-unmoved", {"training.learning_rate": 1e-13}),
    Scenario("a rate far too low", "dpo", "rate-low", {"training.learning_rate": 1e-7}),
    Scenario("a rate far too high", "dpo", "rate-high", {"training.learning_rate": 0.5, "training.warmup_steps": 0}),
    Scenario("a rate far too high, sft", "sft", "rate-high", {"training.learning_rate": 2.0}),
    Scenario("chosen and rejected exchanged in training", "dpo", "splits-disagree",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN))),
    Scenario("the same, with 60 validation rows", "dpo", "splits-disagree",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN)), held=lambda draw, train: pairs(draw, 60)),
    Scenario("labels exchanged in training", "kto", "rewards-together",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN))),
    Scenario("labels drawn at random", "dpo", "accuracy-half", {"training.learning_rate": 3e-4}, train=_random_labels),
    Scenario("sides that differ behind the cut only", "dpo", "same-pairs", {"training.max_completion_length": 16},
             train=_same_behind_the_cut),
    Scenario("every pair in both orders", "dpo", "contradictions", train=_both_ways),
    Scenario("another reference than the model at the start", "dpo", "reference-mismatch",
             {"post_training.ref_model_id": OTHER}, after=_says("ref_model_id", "null")),
    Scenario("all answers cut before their end", "dpo", "no-end-token", {"training.max_completion_length": 16},
             train=_too_long),
    Scenario("validation rows that are trained on", "dpo", "leakage", held=lambda draw, train: train[:NUM_EVAL]),
    Scenario("half of the rows four times", "sft", "duplicates", train=_repeated),
    Scenario("few rows, many epochs", "sft", "risen",
             {"training.num_epochs": 30, "training.learning_rate": 1e-3, "training.eval_steps": 8},
             train=lambda draw: pairs(draw, 96)),
    Scenario("chosen answers that fall with the rejected ones", "dpo", "likelihood-displacement",
             {"training.learning_rate": 2e-3}),
    Scenario("the beta of dpo for simpo", "simpo", "simpo-beta", {"post_training.simpo_beta": 0.1}),
    Scenario("one answer to everything", "sft", "duplicates", train=_one_answer),
    Scenario("the chosen side is the longer one", "dpo", "length-bias", train=_longer_is_chosen),
    Scenario("one label only", "kto", "labels", train=lambda draw: pairs(draw, NUM_TRAIN)),
    Scenario("completions that are all cut", "grpo", "completions-clipped", {"training.max_completion_length": 4}),
    Scenario("completions that are all cut and left out", "grpo", "completions-clipped",
             {"training.max_completion_length": 4, "post_training.mask_truncated_completions": True}),
    Scenario("a reward that pays nothing", "grpo", "groups-without-signal", rewarded("nothing"),
             train=lambda draw: to_train(pairs(draw, NUM_TRAIN))),
    Scenario("a reward that pays for length", "grpo", "longer-not-better", rewarded("length"),
             train=lambda draw: to_train(pairs(draw, NUM_TRAIN))),
    Scenario("a reward that pays for the wrong thing", "grpo", "reward-hacking", rewarded("second half"),
             train=lambda draw: to_train(pairs(draw, NUM_TRAIN))),
    Scenario("a policy that becomes sure", "grpo", "entropy-collapse",
             {**rewarded("one word"), "training.learning_rate": 1.5e-2, "training.num_epochs": 3},
             train=lambda draw: to_train(pairs(draw, NUM_TRAIN)),
             held=lambda draw, train: to_train(pairs(draw, NUM_EVAL))),
    Scenario("a policy far from its reference", "grpo", "kl-high",
             {"training.learning_rate": 2e-2, "training.num_epochs": 2, "post_training.beta": 1e-4}),
    Scenario("samples that are used too often", "grpo", "ratios-clipped",
             {"training.learning_rate": 1e-2, "rollout.num_iterations": 16, "training.max_steps": 96}),
    Scenario("a sampler whose weights lag", "grpo", "sampler-mismatch",
             {"post_training.sampler_correction": "token_truncate"}, during=_sampler_lags),
    Scenario("a teacher that is the student", "distill", "teacher-is-student",
             {"post_training.teacher_model_id": STUDENT}),
    Scenario("numbers that are not finite", "dpo", "ended-by-error", {"training.learning_rate": 1e30}, fails=True),
    Scenario("steps that are skipped, since they are not finite", "dpo", "not-finite",
             {"training.learning_rate": 1e30, "training.on_nonfinite": "skip", "training.max_steps": 8,
              "dataset.val_file": None}),
    Scenario("a warm-up that never begins", "dpo", "rate-zero", during=_rate_of_zero),
    Scenario("a beta that is 0 in float32", "dpo", "gradient-zero", {"post_training.beta": 1e-42}),
    Scenario("another loss than the configuration says", "dpo", "first-loss",
             {"post_training.loss_type": "hinge"}, after=_says("loss_type", "sigmoid")),
    Scenario("weights that do not belong to the tokenizer", "sft", "first-likelihood",
             {"models.0.huggingface_id": OTHER}),
    Scenario("a template that begins twice", "dpo", "double-bos", {"models.0.huggingface_id": TWICE},
             train=lambda draw: _as_messages(pairs(draw, NUM_TRAIN)),
             held=lambda draw, train: _as_messages(pairs(draw, NUM_EVAL))),
    Scenario("validation rows of another kind", "sft", "worse-than-start", train=told_apart,
             held=lambda draw, train: turned(told_apart(draw, NUM_EVAL))),
    Scenario("a few rows that are unlike all others", "sft", "gradient-spikes",
             {"models.0.huggingface_id": TAUGHT, "training.num_epochs": 6, "training.learning_rate": 3e-3},
             train=lambda draw: _same_answer(draw, others=6),
             held=lambda draw, train: _same_answer(draw)[:NUM_EVAL]),
    Scenario("a limit of the gradient far too low", "dpo", "always-clipped", {"training.max_grad_norm": 1e-3}),
    Scenario("a run of ten steps", "dpo", "few-steps", {"training.max_steps": 10}),
    Scenario("a few validation rows", "dpo", "eval-size", held=lambda draw, train: pairs(draw, 20)),
    Scenario("every pair in both orders, with other prompts", "dpo", "accuracy-falls", train=_nearly_both_ways),
    Scenario("a beta that holds nothing", "dpo", "drift",
             {"training.learning_rate": 5e-3, "post_training.beta": 0.01, "post_training.sft_weight": 1.0},
             train=told_apart, held=lambda draw, train: told_apart(draw, NUM_EVAL)),
    Scenario("a rate far too high, without a reference", "cpo", "chosen-falls",
             {"training.learning_rate": 5e-3, "post_training.cpo_alpha": 0.0}),
    Scenario("chosen and rejected exchanged, without a reference", "orpo", "odds-idle",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN))),
    Scenario("pairs that a shallow cue tells apart", "dpo", "saturated", {"training.learning_rate": 1e-4},
             train=told_apart, held=lambda draw, train: told_apart(draw, NUM_EVAL)),
    Scenario("rows that are broken", "dpo", "rows-lost",
             {"dataset.on_error": "skip", "dataset.max_dropped_fraction": 1.0}, train=_broken_rows),
    Scenario("samples that are used twice at a rate far too low", "grpo", "ratios-never-clipped",
             {"training.learning_rate": 1e-6, "rollout.num_iterations": 2}),
    Scenario("a reward that pays for length, at a low rate", "grpo", "length-rewarded",
             {**rewarded("length"), "training.learning_rate": 1e-5},
             train=lambda draw: to_train(pairs(draw, NUM_TRAIN)),
             held=lambda draw, train: to_train(pairs(draw, NUM_EVAL))),
    Scenario("a rate far too low, sft", "sft", "sft-still", {"training.learning_rate": 1e-7}),
    Scenario("an answer of one word, again and again", "sft", "repetition",
             {"finetuning.sample_prompts": 8, "finetuning.sample_max_new_tokens": 16},
             train=lambda draw: [{**row, "chosen": " w7" * 12} for row in pairs(draw, NUM_TRAIN)],
             held=lambda draw, train: [{**row, "chosen": " w7" * 12} for row in pairs(draw, NUM_EVAL)]),
)  # fmt: skip


UNTRIED: Mapping[str, str] = {
    "kl-zero": "no run has been tried yet; it is tried on folders made in code",
    "forecast-exceeded": "no run has been tried yet; it is tried on folders made in code",
    "one-reward-wins": "no small run was found that shows it; it is tried on folders made in code",
    "worse-grow-longer": "no small run was found that shows it; it is tried on folders made in code",
    "rows": "it is never raised: it stands under what was not checked where data.json is missing",
    "completions-cut": "a cut takes the end token as well, so `no-end-token` is told in its place",
}
"""Findings that no run here is broken for, with the reason."""


def scenarios() -> list[Scenario]:
    """All of them, healthy ones first."""
    healthy = [Scenario(f"healthy {name}", name.split()[0], keys=keys) for name, keys in METHODS.items()]
    return [*healthy, *BROKEN]


def write_models(folder: Path) -> None:
    """Two models of other weights, with one tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<eos>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(words), eos_token_id=2, bos_token_id=None, pad_token_id=0, max_position_embeddings=128, **sizes
    )
    for name in ("model", "other", "twice"):
        torch.manual_seed(int(name == "other"))
        model = LlamaForCausalLM(config)
        if name == "other":  # far enough to be told from rounding
            with torch.no_grad():
                model.lm_head.weight.mul_(20)
        if name == "twice":
            tokenizer.bos_token, tokenizer.chat_template = "<eos>", BEGINS_TWICE
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def trained(scenario: Scenario, folder: Path, seed: int = 0) -> Path:
    """The run folder. folder: has the models; rows and runs are written there."""
    import strop
    from strop.errors import StropError

    taught = folder / "taught" / "run" / "final"
    if (scenario.samples or TAUGHT in scenario.keys.values()) and not taught.is_dir():
        trained(Scenario("taught", "sft", keys={**TEACHING, "training.output_dir": str(taught.parents[1])}), folder)
        (folder / "rewards.py").write_text(REWARD)
    draw = random.Random(seed)
    place = folder / f"{scenario.name.replace(' ', '-').replace(',', '')}-{seed}"
    place.mkdir()
    train = scenario.train(draw)
    held = scenario.held(draw, train)
    shape = as_prompts if scenario.samples else SHAPES.get(scenario.method, lambda rows: rows)
    files = {"train_file": shape(train), "val_file": shape(held)}
    if scenario.first == "labels":
        files["train_file"] = [row for row in files["train_file"] if row["label"]]
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {OTHER: "other", STUDENT: "model", TWICE: "twice"}
    folders = {word: str(folder / name) for word, name in folders.items()} | {TAUGHT: str(taught)}
    keys = {**(SAMPLING | rewarded() if scenario.samples else {}), **scenario.keys}
    keys = {k: folders.get(v, v) if isinstance(v, str) else v for k, v in keys.items()}
    if scenario.samples:
        file = str(folder / "rewards.py")
        keys["rewards"] = [{**reward, "name": reward["name"].replace("REWARDS", file)} for reward in keys["rewards"]]
    overrides = {
        **RECIPE,
        "models.0.huggingface_id": str(folder / "model"),
        "post_training.method": scenario.method,
        **{f"dataset.{name}": str(place / f"{name}.jsonl") for name in files},
        "training.output_dir": str(place),
        "seed": seed,
        **keys,
    }
    try:
        with scenario.during():
            strop.train(strop.load_config(overrides=overrides))
    except StropError:
        if not scenario.fails:
            raise
    run = place / "run"
    if scenario.after is not None:
        scenario.after(run)
    return run
