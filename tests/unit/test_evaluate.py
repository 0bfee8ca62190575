"""`strop eval`: a run's own numbers, TRL's numbers, and intervals that cover what they should."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import strop
from strop import session
from strop.cli import main
from strop.evaluate import intervals
from strop.evaluate.intervals import Interval, Metric, Ratio
from strop.evaluate.table import in_words
from strop.policy.model.configuration import quiet

CHATML = (
    "{% for m in messages %}{{ '\n' if not loop.first }}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def rows(pair: bool, n: int = 10) -> list[dict[str, Any]]:
    found = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"question {i} " + "hello " * (i % 3)}]
        good, bad = ([{"role": "assistant", "content": text * (1 + i % 3)}] for text in ("yes ", "no maybe "))
        chosen = {"chosen": good, "rejected": bad} if pair else {"completion": good}
        found.append({"prompt": prompt, **chosen})
    return found


@pytest.fixture
def place(tmp_path: Path, make_model: Any, make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Path:
    """A base, another whole model, and an adapter; with rows of two kinds."""
    for name, seed in (("base", 0), ("other", 1)):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer(CHATML).save_pretrained(tmp_path / name)
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(2)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn_like(weight) * 0.3
        adapted.save_pretrained(tmp_path / "adapter")
    for name, pair in (("pairs", True), ("singles", False)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(pair)))
    return tmp_path


def evaluated(place: Path, models: list[str], data: str, *flags: str) -> dict[str, Any]:
    target = place / f"numbers-{len(list(place.glob('numbers-*')))}.json"
    words = [*(str(place / model) for model in models), "--data", str(place / f"{data}.jsonl"), "--output", str(target)]
    assert main(["eval", *words, *flags]) == 0
    return json.loads(target.read_text())


@pytest.mark.share(1)
@pytest.mark.filterwarnings("ignore")  # TRL and its dependencies warn of their own future
@pytest.mark.parametrize(("method", "trained_by"), [("sft", "TRL"), ("dpo", "TRL"), ("dpo", "strop")])
def test_the_numbers_are_those_of_trl_s_own_evaluation(method: str, trained_by: str, place: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is the oracle; install the extra `dev`")
    from datasets import Dataset

    pair = method == "dpo"
    settings: dict[str, Any] = {
        "output_dir": str(place / "trl"),
        "per_device_eval_batch_size": 10,  # TRL takes the mean of the means of batches
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_length": 512,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    data = Dataset.from_list(rows(pair))
    if trained_by == "strop":
        words = ["--model", str(place / "other"), "--train-file", str(place / "pairs.jsonl"), "--method", "dpo"]
        words += ["--max-steps", "1", "--learning-rate", "1e-3", "--output-dir", str(place / "out")]
        assert main(["train", *words, "--models.0.name", "trained"]) == 0
        (place / "out/trained/final").rename(place / "trained")
    model = AutoModelForCausalLM.from_pretrained(place / ("trained" if trained_by == "strop" else "other"))
    common = {
        "model": model,
        "train_dataset": data,
        "eval_dataset": data,
        "processing_class": PreTrainedTokenizerFast.from_pretrained(place / "base"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if pair:
            reference = AutoModelForCausalLM.from_pretrained(place / "base")
            trainer = trl.DPOTrainer(**common, ref_model=reference, args=trl.DPOConfig(**settings, beta=0.3))
        else:
            trainer = trl.SFTTrainer(**common, args=trl.SFTConfig(**settings))
        if trained_by == "TRL":
            before = model.lm_head.weight.detach().clone()
            trainer.train()
            assert not torch.equal(model.lm_head.weight, before)
            trainer.save_model(str(place / "trained"))
        theirs = trainer.evaluate()
    flags = ("--beta", "0.3", "--reference", str(place / "base")) if pair else ()
    found = evaluated(place, ["trained"], "pairs" if pair else "singles", "--method", method, *flags)
    (ours,) = found["models"]
    assert ours["metrics"]["loss"]["value"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    if pair:
        for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert ours["metrics"][name]["value"] == pytest.approx(theirs[f"eval_{name}"], rel=1e-5, abs=1e-6), name


def test_a_base_against_itself_and_an_adapter_against_its_base(place: Path) -> None:
    found = evaluated(place, ["base", "adapter"], "pairs", "--method", "dpo", "--reference", str(place / "base"))
    base, adapter = (model["metrics"] for model in found["models"])
    assert base["loss"]["value"] == pytest.approx(0.693147, abs=1e-5)
    assert base["rewards/margins"]["value"] == pytest.approx(0, abs=1e-6)  # the two may be cut otherwise, and round so
    assert adapter["rewards/margins"]["value"] != 0 and found["rows"] == 10
    assert adapter["loss"]["difference"] == pytest.approx(adapter["loss"]["value"] - base["loss"]["value"])
    low, high = adapter["loss"]["interval"]
    assert low < adapter["loss"]["value"] < high
    alone = evaluated(place, ["adapter"], "pairs", "--method", "dpo")  # its base is its reference
    assert alone["models"][0]["metrics"]["loss"]["value"] == pytest.approx(adapter["loss"]["value"], rel=1e-6)


def test_one_model_is_in_memory_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[Any]] = []
    build = session.build_policy

    def built(*args: Any, **kwargs: Any) -> Any:
        assert [one() for one in before] == [None] * len(before)
        policy = build(*args, **kwargs)
        before.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(session, "build_policy", built)
    evaluated(place, ["base", "adapter"], "pairs", "--method", "dpo", "--reference", str(place / "other"))
    assert len(before) == 3


@pytest.mark.nightly
def test_an_adapter_and_the_merged_model_are_the_same(place: Path) -> None:
    assert main(["merge", str(place / "adapter"), "--output-dir", str(place / "merged")]) == 0
    found = evaluated(place, ["adapter", "merged"], "singles")
    one, two = (model["metrics"]["loss"] for model in found["models"])
    assert one["value"] == pytest.approx(two["value"], rel=1e-5) and abs(two["difference"]) < 1e-5


@pytest.mark.nightly
def test_an_adapter_is_scored_on_the_tokens_it_was_trained_on(
    place: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer lies beside it, with another chat template than its base; the base is scored on the same tokens."""
    with_sign = CHATML.replace("'<|im_start|>' + m", "'<|im_start|># ' + m")
    make_tokenizer(with_sign).save_pretrained(place / "adapter")
    assert main(["merge", str(place / "adapter"), "--output-dir", str(place / "merged")]) == 0
    merged = evaluated(place, ["merged"], "pairs", "--method", "dpo", "--reference", str(place / "base"))
    found = evaluated(place, ["adapter"], "pairs", "--method", "dpo")
    other = evaluated(place, ["base", "adapter"], "singles")
    own = evaluated(place, ["adapter"], "singles")
    assert "another chat template" in capfd.readouterr().err
    ours, theirs, bases, alone = (x["models"][-1]["metrics"]["loss"]["value"] for x in (found, merged, other, own))
    assert ours == pytest.approx(theirs, rel=1e-5)  # the merged model has the adapter's tokenizer
    assert alone != pytest.approx(bases)


@pytest.mark.nightly
def test_a_run_is_scored_as_it_evaluated_itself(place: Path) -> None:
    """By its own method, on its own columns, cut where it cut them; flags win over what it says, and another method
    that is named has none of its method's settings."""
    file = place / "schön und gut.jsonl"
    long = [
        {**row, "good": row["chosen"], "prompt": [{**row["prompt"][0], "content": "hello " * 40}]} for row in rows(True)
    ]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "chosen"}) + "\n" for row in long))
    keys = {
        "models": [{"huggingface_id": str(place / "base"), "name": "run"}],
        "dataset": {"train_file": str(file), "val_file": str(file), "chosen_column": "good"},
        "post_training": {"method": "dpo", "loss_type": "hinge", "beta": 0.25},
        "training": {"max_steps": 1, "output_dir": str(place), "learning_rate": 1e-2, "warmup_steps": 0},
        "lora": {"r": 2},
    }
    keys["training"] |= {"max_seq_length": 40, "max_prompt_length": 36, "max_completion_length": 3}
    strop.train(strop.load_config(overrides=keys))
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "eval"][-1]
    own = evaluated(place, ["run"], file.stem)
    metrics = own["models"][0]["metrics"]
    assert metrics["loss"]["value"] == pytest.approx(last["loss"], rel=1e-5)
    assert metrics["rewards/margins"]["value"] == pytest.approx(last["rewards/margins"], rel=1e-5)
    assert own == evaluated(place, ["run"], file.stem, "--method", "dpo", "--loss-type", "hinge", "--beta", "0.25")
    flag = evaluated(place, ["run"], file.stem, "--beta", "0.5")["models"][0]["metrics"]["rewards/margins"]["value"]
    assert flag == pytest.approx(2 * metrics["rewards/margins"]["value"])
    whole = evaluated(place, ["run"], file.stem, "--max-seq-length", "512")
    assert whole["models"][0]["metrics"]["loss"]["value"] != metrics["loss"]["value"]
    other = evaluated(place, ["run"], "singles", "--method", "sft")["models"][0]["metrics"]
    assert "nll" in other and "rewards/margins" not in other


@pytest.mark.nightly
def test_tokens_that_mean_something_else_to_a_model_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, plain = 4, len(vocab) - 4  # special tokens come first, and stay
    content["model"]["vocab"] = {t: i if i < first else first + (i - first + 1) % plain for t, i in vocab.items()}
    file.write_text(json.dumps(content))
    words = ["eval", str(place / "base"), str(place / "other"), "--data", str(place / "singles.jsonl")]
    assert main(words) == 1
    assert "of the rows is" in capsys.readouterr().err


@pytest.mark.share(1)
@pytest.mark.parametrize("method", ["kto", "simpo", "orpo"])
def test_other_methods(method: str, place: Path) -> None:
    flags = ["--reference", str(place / "base")] if method == "kto" else []
    found = evaluated(place, ["other"], "pairs", "--method", method, *flags)
    metrics = found["models"][0]["metrics"]
    assert metrics["loss"]["value"] > 0 and len(metrics["loss"]["interval"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "pairs.jsonl"], "no model and no run is given"),
        (["other", "--data", "pairs.jsonl", "--method", "dpo"], "what it was trained from is not known"),
        (["other"], "no rows are named"),
        (["other", "--data", "singles.jsonl", "--reference", "base"], "compares with no reference"),
        (["other", "--data", "gone.jsonl"], "there is no such file"),
        (["./gone", "--data", "singles.jsonl"], "there is no such folder"),
        (["other", "./gone", "--data", "singles.jsonl"], "there is no such folder"),
    ],
)
def test_what_is_refused(
    words: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["eval", *words]) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and "scoring" not in told


# ---- intervals


def value(metric: Metric) -> float:
    """Every row once."""
    return float(intervals.value(metric, np.ones(len(metric[0].sums))))


def interval(metric: Metric, seed: int) -> Interval | None:
    return intervals.interval(*intervals.resampled([metric], seed))


def difference(one: Metric, other: Metric, seed: int) -> Interval | None:
    drawn = intervals.resampled([one, other], seed)
    return intervals.interval(drawn[1] - drawn[0])


def test_a_value_is_a_ratio_of_sums_and_sums_of_several() -> None:
    one, two = Ratio(np.array([1.0, 5.0]), np.array([1.0, 3.0])), Ratio(np.array([2.0, 2.0]), np.array([1.0, 1.0]))
    assert value([one]) == 1.5 and value([one, two]) == 3.5
    assert interval([Ratio(np.ones(1), np.ones(1))], 0) is None


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random, covered = np.random.default_rng(1), 0
    for trial in range(200):
        counts = random.integers(1, 9, 60).astype(float)
        sums = counts * 0.7 + random.normal(size=60) * np.sqrt(counts)
        found = interval([Ratio(sums, counts)], trial)
        assert found is not None
        covered += found.low <= 0.7 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_differences_are_of_paired_rows() -> None:
    """Two models that differ by the same on every row: rows vary, the difference does not."""
    random = np.random.default_rng(0)
    counts, sums = np.ones(50), random.normal(size=50) * 10
    found = difference([Ratio(sums, counts)], [Ratio(sums + 0.25, counts)], 0)
    assert found is not None and found.low == pytest.approx(0.25) == pytest.approx(found.high)
    alone = interval([Ratio(sums, counts)], 0)
    assert alone is not None and alone.high - alone.low > 2


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.692819, 0.693021, "[0.692819, 0.693021]"),  # the logarithm of 2 lies above it
        (-316.8, -281.04, "[-316.8, -281]"),
        (0.0002457, 0.0006561, "[0.0002457, 0.0006561]"),
        (0.6931471806, 0.6931471806, "[0.6931, 0.6931]"),
        (-1e-9, 1e-9, "[-1e-09, 1e-09]"),
    ],
)
def test_the_ends_of_an_interval_have_the_digits_in_which_they_differ(low: float, high: float, shown: str) -> None:
    entry = {"value": (low + high) / 2, "interval": [low, high]}
    table = {"rows": 2, "reference": None, "level": 0.95, "models": [{"model": "m", "metrics": {"loss": entry}}]}
    assert shown in list(in_words(table))[-1]


@pytest.mark.parametrize("flag", ["--limit=3", "--num-fewshot=0", "--apply-chat-template"])
def test_a_flag_of_tasks_without_tasks_is_refused_however_it_is_written(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "model", "--data", "rows.jsonl", flag]) == 1
    assert f"{flag.partition('=')[0]} belongs to tasks, and --tasks is missing" in capsys.readouterr().err
