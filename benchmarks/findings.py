"""Whether findings are right: healthy runs of every method, and runs that are broken on purpose.

    python -m benchmarks.findings [--only TEXT ...] [--seeds 0,1,2] [--write] [--picture FILE.png]

Every run is trained here, by a tiny model on rows of words: the words of a chosen answer come from one half of the
vocabulary more often than those of a rejected one, so there is something to learn, and it cannot be learnt wholly. A
healthy run must raise no `fail`, and few of lesser weight; a broken one must raise the finding that it was made for
first, with every seed, which draws other rows and other steps. `--only` takes the runs whose name has one of these
texts. `--write` puts each row into the table of docs/findings.md as soon as it is known. `--picture` takes one of the
page that the README shows, with chromium. The exit code is 1 where one of them does not do so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
BEGIN, END = "<!-- calibration: python -m benchmarks.findings --write -->", "<!-- end -->"
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


SHAPES: Mapping[str, Callable[[Rows], Rows]] = {"sft": as_sft, "distill": as_sft, "kto": as_kto, "grpo": as_prompts}

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
    others = {"length": len(words) / 24, "second half": 1 - first, "nothing": 0.0}
    others["one word"] = max(map(words.count, words), default=0) / size
    return others.get(pays, first) - 0.05 * max(0, len(words) - 12) * (pays != "length")
'''
"""A file with the reward of runs that sample."""


def rewarded(pays: str | None = None) -> Mapping[str, Any]:
    """The reward as a setting. pays: see `REWARD`."""
    return {"rewards": [{"name": "REWARDS:quality", "settings": {} if pays is None else {"pays": pays}}]}


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


def _same_behind_the_cut(draw: random.Random) -> Rows:
    """Most pairs differ behind the cut only; such are dropped."""
    rows = [pair(draw, length=24) for _ in range(NUM_TRAIN - 60)]
    return [{**row, "rejected": f"{row['chosen']} {draw.choice(WORDS)}"} for row in rows] + pairs(draw, 60)


def _both_ways(draw: random.Random) -> Rows:
    rows = pairs(draw, NUM_TRAIN // 2)
    return rows + turned(rows)


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


def _no_reference_named(folder: Path) -> None:
    """The run took another reference than its configuration says."""
    path = folder / "config.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join("  ref_model_id: null" if "ref_model_id:" in x else x for x in lines) + "\n", "utf-8")


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


OTHER = "OTHER MODEL"
"""Stands for the folder of a model with other weights."""
STUDENT = "THE MODEL ITSELF"
BROKEN: tuple[Scenario, ...] = (
    Scenario("a rate that rounding swallows", "dpo", "weights-unmoved", {"training.learning_rate": 1e-13}),
    Scenario("a rate far too low", "dpo", "rate-low", {"training.learning_rate": 1e-7}),
    Scenario("a rate far too high", "dpo", "rate-high", {"training.learning_rate": 0.5, "training.warmup_steps": 0}),
    Scenario("a rate far too high, sft", "sft", "rate-high", {"training.learning_rate": 2.0}),
    Scenario("chosen and rejected exchanged in training", "dpo", "splits-disagree",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN))),
    Scenario("labels exchanged in training", "kto", "rewards-together",
             train=lambda draw: turned(pairs(draw, NUM_TRAIN))),
    Scenario("labels drawn at random", "dpo", "accuracy-half", {"training.learning_rate": 3e-4}, train=_random_labels),
    Scenario("sides that differ behind the cut only", "dpo", "rows-lost", {"training.max_completion_length": 16},
             train=_same_behind_the_cut),
    Scenario("every pair in both orders", "dpo", "contradictions", train=_both_ways),
    Scenario("another reference than the model at the start", "dpo", "reference-mismatch",
             {"post_training.ref_model_id": OTHER}, after=_no_reference_named),
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
    Scenario("an answer of one word, again and again", "sft", "repetition",
             {"finetuning.sample_prompts": 8, "finetuning.sample_max_new_tokens": 16},
             train=lambda draw: [{**row, "chosen": " w7" * 12} for row in pairs(draw, NUM_TRAIN)],
             held=lambda draw, train: [{**row, "chosen": " w7" * 12} for row in pairs(draw, NUM_EVAL)]),
)  # fmt: skip


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
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if name == "other":  # far enough to be told from rounding
            with torch.no_grad():
                model.lm_head.weight.mul_(20)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def trained(scenario: Scenario, folder: Path, seed: int = 0) -> Path:
    """The run folder. folder: has the models; rows and runs are written there."""
    import strop
    from strop.errors import StropError

    taught = folder / "taught" / "run" / "final"
    if scenario.method == "grpo" and not taught.is_dir():
        trained(Scenario("taught", "sft", keys={**TEACHING, "training.output_dir": str(taught.parents[1])}), folder)
        (folder / "rewards.py").write_text(REWARD)
    draw = random.Random(seed)
    place = folder / f"{scenario.name.replace(' ', '-').replace(',', '')}-{seed}"
    place.mkdir()
    train = scenario.train(draw)
    held = scenario.held(draw, train)
    shape = SHAPES.get(scenario.method, lambda rows: rows)
    files = {"train_file": shape(train), "val_file": shape(held)}
    if scenario.first == "labels":
        files["train_file"] = [row for row in files["train_file"] if row["label"]]
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {OTHER: str(folder / "other"), STUDENT: str(folder / "model"), TAUGHT: str(taught)}
    keys = {**(SAMPLING | rewarded() if scenario.method == "grpo" else {}), **scenario.keys}
    keys = {k: folders.get(v, v) if isinstance(v, str) else v for k, v in keys.items()}
    for reward in keys.get("rewards", []):
        keys["rewards"] = [{**reward, "name": reward["name"].replace("REWARDS", str(folder / "rewards.py"))}]
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


@dataclass(frozen=True)
class Outcome:
    """raised: id and severity of each finding, in order."""

    scenario: Scenario
    raised: Sequence[tuple[str, str]]

    @property
    def is_right(self) -> bool:
        if self.scenario.first:
            return bool(self.raised) and self.raised[0][0] == self.scenario.first
        return all(severity != "fail" for _, severity in self.raised)


def outcome(scenario: Scenario, run: Path) -> Outcome:
    from strop.report.write import examine

    (examined,) = examine([run])
    return Outcome(scenario, [(f.id, str(f.severity)) for f in examined.diagnosis.raised])


HEAD = ("| run | must raise first | told, in order | |", "|---|---|---|---|")


def row(outcomes: Sequence[Outcome]) -> str:
    """A line of Markdown for a run with several seeds. What is told is that of the first seed, and of those that are
    wrong."""
    scenario, wrong = outcomes[0].scenario, [o for o in outcomes if not o.is_right]
    told = "; but: ".join(
        ", ".join(f"{id_} ({severity})" for id_, severity in o.raised) or "nothing"
        for o in (outcomes[0], *(o for o in wrong if o is not outcomes[0]))
    )
    first = f"`{scenario.first}`" if scenario.first else "no `fail`"
    many = f" with {len(outcomes)} seeds" if len(outcomes) > 1 else ""
    verdict = f"right{many}" if not wrong else f"**wrong** with {len(wrong)} of {len(outcomes)}"
    return f"| {scenario.name} | {first} | {told} | {verdict} |"


def written(page: str, outcomes: Sequence[Sequence[Outcome]]) -> str:
    """The page with these outcomes, one or several of each run, in its table; rows of other runs stay."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines() if line.startswith("| ")}
    rows |= {of_run[0].scenario.name: row(of_run) for of_run in outcomes}
    kept = [rows[s.name] for s in scenarios() if s.name in rows]
    right = sum("**wrong**" not in line for line in kept)
    listed = "\n".join([*HEAD, *kept, "", f"{right} of {len(kept)} are right."])
    return f"{before}{BEGIN}\n\n{listed}\n\n{END}{after}"


SHOWN = "chosen and rejected exchanged in training"
"""The run whose page the README shows."""


def picture(target: Path) -> None:
    """The upper part of a page, as a person sees it."""
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("--picture needs chromium on the PATH")
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_models(Path())
        run = trained(next(s for s in scenarios() if s.name == SHOWN), Path()).absolute()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,620"]
        flags += ["--blink-settings=preferredColorScheme=1", "--user-data-dir=profile", "--screenshot=page.png"]
        subprocess.run([browser, *flags, (run / "report.html").as_uri()], check=True, capture_output=True)
        target.write_bytes(Path("page.png").read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=lambda name: Path(name).absolute())
    options = parser.parse_args(arguments)
    if options.picture is not None:
        picture(options.picture)
        return 0
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        for scenario in scenarios():
            if not any(text in scenario.name for text in options.only):
                continue
            outcomes.append([outcome(scenario, trained(scenario, Path(name), seed)) for seed in options.seeds])
            print(row(outcomes[-1]), flush=True)
            if options.write:
                PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), outcomes), encoding="utf-8")
    return int(not all(o.is_right for of_run in outcomes for o in of_run))


if __name__ == "__main__":
    sys.exit(main())
