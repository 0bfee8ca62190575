"""Reward models: what is trained is what plain transformers and peft load and score by, and strop eval counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import strop
from strop.batch import pack, pad
from strop.cli import main
from strop.config import RunConfig
from strop.errors import DataError, ModelError
from strop.evaluate.scoring import evaluate
from strop.export import merge as merging
from strop.export.merge import merge
from strop.export.shards import rewrite
from strop.policy.build import build_policy
from strop.prepared import prepare
from strop.rollout.reward_model import RewardModel

CPU = torch.device("cpu")
KINDS = ("full", "lora")


def row(i: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"hello {i}"}],
        "chosen": [{"role": "assistant", "content": "yes maybe " * (1 + i % 3)}],
        "rejected": [{"role": "assistant", "content": "no dog " * (1 + i % 2)}],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def config_of(folder: Path, model: str, **overrides: Any) -> RunConfig:
    return strop.load_config(
        overrides={
            "models": [{"huggingface_id": model, "name": "run"}],
            "dataset.train_file": write(folder / "rows.jsonl", [row(i) for i in range(12)]),
            "dataset.validation_split": 0.25,
            "post_training.method": "reward",
            "training.output_dir": str(folder / "out"),
            "training.learning_rate": 1e-3,
            "training.warmup_steps": 0,
            "training.max_steps": 4,
            "training.logging_steps": 1,
            "training.groups_per_step": 4,
            "training.save_steps": 2,
            "training.save_total_limit": None,
            "training.micro_batch_tokens": 64,  # by itself it would be another one in runs of a module's fixture
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> dict[str, RunConfig]:
    """A run of each kind."""
    configs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make_model().save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        config = config_of(folder, str(folder / "model"), **{"lora.enabled": kind == "lora"})
        strop.train(config)
        configs[kind] = config
    return configs


def run_of(config: RunConfig) -> Path:
    return Path(config.training.output_dir) / "run"


def final_of(config: RunConfig) -> Path:
    return run_of(config) / "final"


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_and_peft_load_the_same_rewards(kind: str, ran: dict[str, RunConfig]) -> None:
    config, final = ran[kind], final_of(ran[kind])
    section = config.models[0].model_copy(
        update={"adapter": str(final)} if kind == "lora" else {"huggingface_id": str(final)}
    )
    loaded = config.model_copy(update={"models": (section,), "lora": config.lora.model_copy(update={"enabled": False})})
    policy, groups = build_policy(loaded, section, CPU), list(prepare(loaded, section).data.train)
    with policy.scoring():
        ours = policy(policy.collate(groups)).logps
    tokenizer = AutoTokenizer.from_pretrained(final)
    if kind == "lora":
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            final, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(final)
        assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    model.eval()
    rows = [row(g.origin.line - 1) for g in groups]
    texts = [
        tokenizer.apply_chat_template([*r["prompt"], *r[side]], tokenize=False)
        for r in rows
        for side in ("chosen", "rejected")
    ]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std() > 0.01


def test_shared_rows_give_the_rewards_and_gradients_of_plain_rows(ran: dict[str, RunConfig]) -> None:
    config = ran["full"]
    policy = build_policy(config, config.models[0], CPU)
    groups = list(prepare(config, config.models[0]).data.train)[:4]
    assert policy.share_prefix, policy.plain_reason
    found = []
    for collate in (pack, pad):
        policy.zero_grad()
        rewards = policy(collate(groups)).logps
        (rewards.double() ** 3).sum().backward()
        found.append(
            (rewards.detach(), {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None})
        )
    (shared, shared_gradients), (plain, plain_gradients) = found
    assert shared.shape == (2 * len(groups),)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_eval_counts_pairs_that_are_ranked_right(ran: dict[str, RunConfig]) -> None:
    first = [str(run_of(ran[kind])) for kind in KINDS]
    found = evaluate(ran["full"], first)
    assert found.num_rows == 12 and found.reference is None
    for name, kind, model in zip(first, KINDS, found.models, strict=True):
        assert model.name == name and {"loss", "rewards/accuracies", "rewards/margins"} <= model.numbers.keys()
        records = [json.loads(line) for line in (run_of(ran[kind]) / "metrics.jsonl").read_text().splitlines()]
        started = next(r for r in records if r["split"] == "eval")
        assert model.numbers["loss"] < started["loss"], "training lowered it"


def test_eval_refuses_a_model_without_a_head(ran: dict[str, RunConfig]) -> None:
    with pytest.raises(ModelError, match="no head of a reward model"):
        evaluate(ran["full"], [ran["full"].models[0].huggingface_id])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_bit_for_bit(kind: str, ran: dict[str, RunConfig], tmp_path: Path) -> None:
    config = ran[kind]
    training = config.training.model_copy(update={"output_dir": str(tmp_path / "again")})
    resumed = config.model_copy(update={"training": training})
    strop.train(resumed, resume=str(run_of(config) / "checkpoint-2"))
    keys = ("step", "loss", "grad_norm", "weights_digest", "rewards/margins")
    before, after = (
        [
            [r[k] for k in keys]
            for r in map(json.loads, (run_of(c) / "metrics.jsonl").read_text().splitlines())
            if r["split"] == "train" and r["step"] > 2
        ]
        for c in (config, resumed)
    )
    assert len(before) == 2 and before == after


def test_the_first_head_follows_from_the_seed(ran: dict[str, RunConfig]) -> None:
    config = ran["full"]

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, ()).item()))  # whatever was drawn before
        found = build_policy(config.model_copy(update={"seed": seed}), config.models[0], CPU)
        assert found.has_new_head
        return found.base.score.weight.detach().clone()

    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))


def test_a_reward_model_is_trained_on_with_its_head(ran: dict[str, RunConfig], tmp_path: Path) -> None:
    config = config_of(tmp_path, str(final_of(ran["full"])))
    policy = build_policy(config, config.models[0], CPU)
    assert not policy.has_new_head
    (result,) = strop.train(config)
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (run_of(ran["full"]) / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["split"] == before[-1]["split"] == "eval"
    assert records[0]["rewards/margins"] == pytest.approx(before[-1]["rewards/margins"], abs=0.05)


def test_margins_are_read_and_must_be_in_every_row(tmp_path: Path, model_dir: Path) -> None:
    config = config_of(tmp_path, str(model_dir))
    write(tmp_path / "rows.jsonl", [{**row(i), "margin": i / 4} for i in range(12)])
    groups = prepare(config, config.models[0]).data.train
    assert [list(g.numbers["margin"]) for g in groups] == [[(g.origin.line - 1) / 4] for g in groups]
    write(tmp_path / "rows.jsonl", [row(i) if i == 5 else {**row(i), "margin": 1} for i in range(12)])
    with pytest.raises(DataError, match="the row has no margin") as refused:
        prepare(config, config.models[0])
    assert refused.value.where is not None and refused.value.where.endswith(":6")
    other = config.model_copy(
        update={
            "post_training": strop.load_config(
                overrides={"models": [{"huggingface_id": str(model_dir)}], "post_training.method": "dpo"}
            ).post_training
        }
    )
    assert all("margin" not in g.numbers for g in prepare(other, config.models[0]).data.train), (
        "no other method reads it"
    )


def test_a_margin_that_is_no_number_is_refused(tmp_path: Path, model_dir: Path) -> None:
    config = config_of(tmp_path, str(model_dir))
    write(tmp_path / "rows.jsonl", [{**row(0), "margin": "much"}])
    with pytest.raises(DataError, match="margin"):
        prepare(config, config.models[0])


def test_where_end_and_padding_are_one_token_the_last_other_one_is_judged(
    tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path, str(tmp_path / "model"))
    write(tmp_path / "rows.jsonl", [{"prompt": "hello", "chosen": " yes", "rejected": " no"} for _ in range(2)])
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"validation_split": 0.0})})
    group = prepare(config, config.models[0]).data.train[0]
    assert [tokenizer.decode(list(c.ids[:-1])) for c in group.completions] == [" yes", " no"]
    assert [c.loss_mask for c in group.completions] == [bytes(len(c.ids) - 1) + b"\1" for c in group.completions]


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_write(kind: str, ran: dict[str, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run_of(ran[kind])), "hello"]) == 1
    said = capsys.readouterr().err
    assert "reward model" in said or "ForSequenceClassification" in said


def scores(model: Any, chats: list[list[dict[str, str]]], tokenizer: Any) -> torch.Tensor:
    """By plain transformers, one conversation at a time."""
    ids = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in ids])


CHATS = [[*row(i)["prompt"], *row(i)[side]] for i in range(4) for side in ("chosen", "rejected")]


@pytest.mark.share(1)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("tied", [False, True])
def test_its_adapter_is_merged_and_rewards_as_before(
    tied: bool, ran: dict[str, RunConfig], make_model: Callable[..., Any], make_tokenizer: Any, tmp_path: Path
) -> None:
    run = run_of(ran["lora"])
    if tied:
        make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        (result,) = strop.train(config_of(tmp_path, str(tmp_path / "model"), **{"lora.enabled": True}))
        run = result.run_dir
    proof = merge(str(run), tmp_path / "merged")
    assert not proof.failed and any(line.what.startswith("rewards of 20 prompts") for line in proof.lines)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 1 and merged.config.pad_token_id == tokenizer.pad_token_id
    pad = tokenizer.pad_token_id
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(run / "final", num_labels=1, pad_token_id=pad)
    expected = scores(adapted.eval(), CHATS, tokenizer)
    torch.testing.assert_close(scores(merged, CHATS, tokenizer), expected, rtol=1e-4, atol=1e-5)
    for place in (str(run), str(run / "final"), str(tmp_path / "merged")):
        values, why = RewardModel(place, CPU).values(CHATS)
        assert why == "" and values == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.nightly
def test_a_tampered_merge_of_a_reward_model_is_refused(
    ran: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is another one."""

    def tampered(*arguments: Any, **more: Any) -> Any:
        shard, target, replaced, added, *rest = arguments
        assert set(added) == {"score.weight"}
        return rewrite(shard, target, replaced, {"score.weight": 1.01 * added["score.weight"]}, *rest, **more)

    monkeypatch.setattr(merging, "rewrite", tampered)
    with pytest.raises(ModelError, match="the merged model is not the model with its adapter: rewards"):
        merge(str(run_of(ran["lora"])), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.nightly
def test_an_adapter_of_a_language_model_rewards_nothing(runs: Any) -> None:
    with pytest.raises(ModelError, match="gives no rewards"):
        RewardModel(str(runs(max_steps=1, r=4).path), CPU)


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "kind"), [("sft", "lora"), ("reward", "sft")])
def test_an_adapter_of_the_other_kind_is_refused(
    method: str, kind: str, ran: dict[str, RunConfig], tmp_path: Path
) -> None:
    base = ran["lora"].models[0]
    if kind == "sft":
        rows = write(tmp_path / "single.jsonl", [{"prompt": "a", "completion": "b"} for _ in range(4)])
        config = config_of(
            tmp_path,
            base.huggingface_id,
            **{
                "lora.enabled": True,
                "post_training.method": "sft",
                "training.max_steps": 1,
                "dataset.validation_split": 0.0,
            },
        )
        config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"train_file": rows})})
        (result,) = strop.train(config)
        adapter = result.run_dir / "final"
    else:
        adapter = final_of(ran["lora"])
    section = base.model_copy(update={"adapter": str(adapter)})
    config = config_of(tmp_path, base.huggingface_id, **{"post_training.method": method})
    with pytest.raises(ModelError, match="it is an adapter of a"):
        build_policy(replace_models(config, section), section, CPU)


def replace_models(config: RunConfig, section: Any) -> RunConfig:
    return config.model_copy(update={"models": (section,)})


@pytest.mark.nightly
def test_a_dry_run_says_what_it_will_be(ran: dict[str, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = ran["full"]
    arguments = ["--huggingface-id", config.models[0].huggingface_id, "--train-file", str(config.dataset.train_file)]
    assert main(["train", "--dry-run", "--method", "reward", *arguments]) == 0
    out = capsys.readouterr()
    assert "memory" in out.out + out.err
