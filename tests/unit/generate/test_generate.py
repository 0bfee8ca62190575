"""`strop generate`: the model's own tokens, whatever they are batched with; files in, JSON Lines out."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from strop.cli import main
from strop.errors import DataError, ModelError
from strop.generate import output, sampling
from strop.generate.loading import Source, load
from strop.generate.prompts import read_prompts
from strop.generate.sampling import Sampling, sample
from strop.policy.model.configuration import quiet

PROMPTS = ["hello", "a much longer question than the first one?", "2 + 2 =", "no", "yes yes yes"]


def by_hand(model: Any, ids: Sequence[int], num_tokens: int, stops: set[int]) -> list[int]:
    """The likeliest tokens, without a cache and alone."""
    text = list(ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] in stops:
            break
    return text[len(ids) :]


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model that changes its answers, saved as peft does, without a tokenizer."""
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn_like(weight) * 0.5
        adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_each_prompt_alone(
    family: str, model_dir: Path, make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = model_dir
    if family == "gpt2":  # with learned positions, which padding must not shift
        torch.manual_seed(0)
        settings = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        folder = tmp_path / "gpt2"
        GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=None, eos_token_id=3)).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    model = load(Source.of(str(folder)))
    asked = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    found = dict(sample(model, asked, Sampling(max_new_tokens=12)))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, ids in enumerate(asked):
        expected = by_hand(plain, ids, 12, set(model.stops))
        (answer,) = found[index]
        assert answer.text == model.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
        assert answer.finish == ("stop" if expected[-1] in model.stops else "length")


def test_a_seed_gives_the_same_samples_and_another_one_others(model_dir: Path) -> None:
    model = load(Source.of(str(model_dir)))
    asked = [model.tokenizer(text)["input_ids"] for text in PROMPTS]

    def texts(**changes: Any) -> list[list[str]]:
        settings = Sampling(**{"max_new_tokens": 8, "temperature": 1.0, "num_samples": 3, **changes})
        found = dict(sample(model, asked, settings))
        return [[answer.text for answer in found[i]] for i in range(len(asked))]

    state = torch.random.get_rng_state()
    one = texts()
    assert one == texts() and one != texts(seed=7)
    assert all(len(set(some)) > 1 for some in one)
    assert torch.equal(state, torch.random.get_rng_state())
    likeliest = texts(temperature=0.0, num_samples=1)
    assert texts(top_p=1e-9) == [some * 3 for some in likeliest] == texts(temperature=1e-4)


def test_temperature_is_the_distribution_s(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First tokens of more samples than fit into a batch, against the probabilities of the model's own logits."""
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 1000)
    model = load(Source.of(str(model_dir)))
    ids = model.tokenizer("hello")["input_ids"]
    settings = Sampling(max_new_tokens=1, temperature=0.5, num_samples=2000)
    ((_, answers),) = sample(model, [ids], settings)
    assert len(answers) == 2000
    assert len({tuple(answer.text for answer in answers[n : n + 400]) for n in range(0, 2000, 400)}) == 5
    with torch.no_grad():
        expected = (model.module(input_ids=torch.tensor([ids])).logits[0, -1] / 0.5).softmax(-1)
    best = int(expected.argmax())
    text = model.tokenizer.decode([best], skip_special_tokens=True)
    share = sum(answer.text == text for answer in answers) / 2000
    assert share == pytest.approx(float(expected[best]), abs=4 * (0.25 / 2000) ** 0.5)


def test_stop_texts_end_an_answer(model_dir: Path) -> None:
    model = load(Source.of(str(model_dir)))
    ids = model.tokenizer("hello")["input_ids"]
    ((_, (whole,)),) = sample(model, [ids], Sampling(max_new_tokens=12))
    stop = "he"  # which is in the answer, and is no token of its own there
    ((_, (cut,)),) = sample(model, [ids], Sampling(max_new_tokens=12, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish == "stop" and cut.tokens < whole.tokens
    asked = [ids, model.tokenizer("2 + 2 =")["input_ids"]]
    both = dict(sample(model, asked, Sampling(max_new_tokens=12, stop=(stop,))))
    assert both[0] == [cut] and both[1][0].tokens == 12  # tokens that only fill up the shorter one are not counted


def test_a_file_of_prompts_with_the_base_beside(
    adapter: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "hello"},
        {"prompt": [{"role": "user", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "left out"}]},
        {"text": "hello"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "out/answers.jsonl"
    command = ["generate", str(adapter), "--prompts", str(tmp_path / "prompts.jsonl"), "--base"]
    assert main([*command, "--output", str(target), "--max-new-tokens", "6"]) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["prompt"] for row in found] == [rows[0]["prompt"], rows[1]["prompt"], rows[2]["messages"][:1], "hello"]
    with quiet():
        base = load(Source.of(str(model_dir)))
        plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, str(adapter)).eval()
    questions = ["hello", "yes", "no", "hello"]
    for row, question in zip(found, questions, strict=True):
        turns = [{"role": "user", "content": question}]
        ids = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        own, before = by_hand(adapted, ids, 6, set(base.stops)), by_hand(base.module, ids, 6, set(base.stops))
        assert row["completion"] == base.tokenizer.decode(own, skip_special_tokens=True)
        assert row["base_completion"] == base.tokenizer.decode(before, skip_special_tokens=True)
        assert (row["sample"], row["tokens"]) == (0, len(own))
    assert any(row["completion"] != row["base_completion"] for row in found)
    capsys.readouterr()
    assert main([*command, "--output", str(target)]) == 1
    assert "it is there already" in capsys.readouterr().err
    assert main([*command, "--max-new-tokens", "6"]) == 0
    assert f"base:    {found[0]['base_completion']}" in capsys.readouterr().out.replace("\\x", "\x00")


def test_one_prompt_is_streamed(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model_dir), "hello", "--raw", "--max-new-tokens", "5"]) == 0
    model = load(Source.of(str(model_dir)))
    ids = model.tokenizer("hello")["input_ids"]
    ((_, (answer,)),) = sample(model, [ids], Sampling(max_new_tokens=5))
    assert capsys.readouterr().out.rstrip("\n") == answer.text.rstrip("\n")


def test_a_chat_has_all_turns_before_it(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nyes\n/new\nyes\n/quit\nnever\n"))
    asked: list[list[int]] = []

    def noted(model: Any, prompts: Sequence[Sequence[int]], settings: Sampling, streamer: Any = None) -> Any:
        asked.extend(list(ids) for ids in prompts)
        yield from sample(model, prompts, settings, streamer)

    monkeypatch.setattr("strop.generate.chat.sample", noted)
    assert main(["generate", str(model_dir), "--max-new-tokens", "4"]) == 0
    texts = [load(Source.of(str(model_dir))).tokenizer.decode(ids) for ids in asked]
    assert len(texts) == 3 and "hello" in texts[1] and texts[1].count("<|im_start|>assistant") == 2
    assert "hello" not in texts[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no model and no run is given"),
        (["M", "hi", "--prompts", "F"], "are both given"),
        (["M", "hi", "--temperature", "-1"], "--temperature is -1"),
        (["M", "hi", "--top-p", "0"], "--top-p is 0"),
        (["M", "hi", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["M", "hi", "--num-samples", "2"], "which gives the same answer each time"),
        (["M", "hi", "--stop", ""], "--stop is empty"),
        (["M", "hi", "--temperature", "nan"], "--temperature is nan"),
        (["M", "--base"], "--base without a prompt"),
        (["M", "hi", "--max-new-tokens", "600"], "600 more may follow"),
        (["M", "hi", "--base"], "what it was trained from is not known"),
        (["M", "--prompts", "gone.jsonl"], "there is no such file"),
        (["./gone", "hi"], "there is no such folder"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *(str(model_dir) if word == "M" else word for word in arguments)]) == 1
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_the_files_beside_an_adapter_are_checked_as_a_model_s_are(
    adapter: Path, model_dir: Path, make_tokenizer: Callable[..., Any]
) -> None:
    make_tokenizer().save_pretrained(adapter)
    generation = adapter / "generation_config.json"
    generation.write_text('{"eos_token_id": [5, 6]}')
    assert load(Source.of(str(adapter))).stops == (5, 6)
    generation.write_text('{"eos_token_id": ["five"]}')
    with pytest.raises(ModelError, match="eos_token_id holds 'five'"):
        load(Source.of(str(adapter)))
    generation.write_text("{}")
    assert load(Source.of(str(adapter))).stops == load(Source.of(str(model_dir))).stops
    endless = make_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(adapter)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load(Source.of(str(adapter)))


def test_a_disk_that_fills_up_while_answers_are_written(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output, "write_file", full)
    target = tmp_path / "out/answers"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": "yes"}\n' * 3)
    for command in (
        ["generate", str(model_dir), "hi", "--max-new-tokens", "2"],
        ["eval", str(model_dir), "--data", str(rows)],
    ):
        assert main([*command, "--output", str(target)]) == 1
        assert "No space left on device" in capsys.readouterr().err


def test_lines_of_a_text_file_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "fünf.txt").write_text("hello\n\nyes: no\n", encoding="utf-8")
    assert [prompt.given for prompt in read_prompts(str(tmp_path / "fünf.txt"))] == ["hello", "yes: no"]
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="there are no prompts in the file"):
        read_prompts(str(tmp_path / "empty.txt"))


def test_rows_without_a_prompt_are_named(model_dir: Path, tmp_path: Path) -> None:
    from strop.generate.prompts import read_prompts

    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": null, "messages": [{"role": "user", "content": "hi"}]}\n')
    assert read_prompts(str(file))[0].given == [{"role": "user", "content": "hi"}]
    file.write_text('{"prompt": "good"}\n{"answer": "what?"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has no prompt"):
        read_prompts(str(file))
    file.write_text("")
    with pytest.raises(DataError, match="there are no prompts"):
        read_prompts(str(file))
