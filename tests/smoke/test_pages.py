"""Every command, configuration and piece of Python that a page shows is run, with a tiny model and a few rows under the
names that pages use. What cannot be run here is in `shown.NOT_RUN`, with the reason.

A page is one story: its blocks are run in their order, in one folder. Sections of the README, and the commands in the
comments of a configuration, each begin anew. The rows and commands of data.md are run by test_data_page.py.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import strop
from shown import (
    NOT_RUN,
    PAGES,
    ROOT,
    SMALL,
    Block,
    blocks,
    blocks_of,
    commands,
    file_name,
    is_configuration,
    name_of,
    names_a_command,
    why_not,
    with_stand_ins,
)
from strop.cli import COMMANDS, main
from strop.report.serve import PageServer

MODELS = (
    "org/model",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "OWNER/TEACHER",
)
REWARD_MODEL = "OWNER/NAME"
NUM_ROWS = 100
PAIRS = [{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no maybe"} for i in range(NUM_ROWS)]
SINGLE = [
    {"prompt": f"question {i}", "completion": f"yes {i}", "answer": f"{i}", "final": f"{i}"} for i in range(NUM_ROWS)
]
GROUPS = [
    {"prompt": f"question {i}", "completions": ["yes", "no", "maybe"], "rewards": [1, 0, 0]} for i in range(NUM_ROWS)
]
LABELLED = [{"prompt": f"question {i}", "completion": "yes", "label": i % 2 == 0} for i in range(NUM_ROWS)]
FILES = {
    "pairs.jsonl": PAIRS,
    "rows.jsonl": PAIRS,
    "raw.jsonl": PAIRS,
    "test.jsonl": PAIRS[:8],
    "prompts.jsonl": SINGLE[:2],
    "rollouts.jsonl": GROUPS,
    "gsm8k.train.jsonl": SINGLE,
    "data/rollouts.jsonl": GROUPS,
    "data/splits/train.jsonl": SINGLE,
    "data/splits/val.jsonl": SINGLE[:8],
    "data/splits/train.dpo.jsonl": PAIRS,
    "data/splits/val.dpo.jsonl": PAIRS[:8],
    "trl-lib/ultrafeedback_binarized/train.jsonl": PAIRS,
    "trl-lib/Capybara/train.jsonl": SINGLE,
    "trl-lib/kto-mix-14k/train.jsonl": LABELLED,
}
DPO = {
    "models": [{"name": "mine", "huggingface_id": "model"}],
    "dataset": {"train_file": "pairs.jsonl", "validation_split": 0.1},
    "post_training": {"method": "dpo"},
    "lora": {"r": 4},
}
THEIRS = {"model_name_or_path": "org/model", "beta": 0.2, "learning_rate": 1e-6, "loss_type": "sigmoid"}
DATA_OF_TRL = {"dataset_name": "trl-lib/ultrafeedback_binarized"}
MESSAGES = [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": "yes"}]
NIGHTLY = (
    "What it looks like|using-your-model|AGENTS|gsm8k|"
    "configs/(?:cpo|dpo_example|ipo|multi_model_dpo|orpo|simple_dpo|simpo)"
)
"""Pages whose commands take long or are much like those of others; `make nightly` runs them."""
GOOD = {"doctor": (0, 1), "compare": (0, 2)}
"""Exit codes that are no error: this computer lacks things, two runs differ."""
LIKE = {"sft": "data/splits/train.jsonl", "distill": "data/splits/train.jsonl", "grpo": "data/splits/train.jsonl"}
"""The rows of a configuration that names none, by its method; else pairs."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    """A model, a run, files of rows and configurations, by the names that pages use."""
    folder: Path = tmp_path_factory.mktemp("pages")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder / "model", folder / name)
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    judge.save_pretrained(folder / REWARD_MODEL)
    make_tokenizer().save_pretrained(folder / REWARD_MODEL)
    for name, rows in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("configs", "scripts", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "dpo.yaml").write_text(yaml.safe_dump(DPO))
    (folder / "their.yaml").write_text(yaml.safe_dump({**THEIRS, **DATA_OF_TRL}))
    (folder / "arguments.json").write_text(json.dumps(THEIRS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split(f"train --config dpo.yaml --models.0.name NAME {SMALL}")) == 0
        assert main(shlex.split("convert model --to consolidated --output-dir consolidated")) == 0
    shutil.copytree(folder / "outputs/NAME", folder / "outputs/OTHER")
    for file in (folder / "outputs/NAME/checkpoint-2").glob("*.safetensors"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command would wait for or ask of others: a chat has one question, a page is served until Ctrl-C, a hub
    takes what is sent."""

    def interrupted(_: PageServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    made = SimpleNamespace(repo_id="owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a login")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: made)
    sent = SimpleNamespace(commit_url="https://hub/owner/name/commit/1")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *_, **__: sent)


# ---- running


def run_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is shown, or what can be said of one that is not run."""
    program, *words = shlex.split(with_stand_ins(line))
    if program == "strop" and why_not(line) is None:
        answered(line, words, capsys)
    else:
        assert why_not(line), f"it is neither run nor in shown.NOT_RUN: {line}"
        look_at(program, words, capsys)


def answered(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Calls the command. What a sentence leaves out, such as `--config`, is put in."""
    words = [word for word in words if not re.fullmatch(r"\.\.\.|[|]", word)]
    if words[0] in ("train", "reference") and not {"--config", "--help"} & set(words):
        words += ["--config", "dpo.yaml"]
    if words[0] == "report" and len(words) > 1 and words[1].startswith("-"):
        words.insert(1, "outputs/NAME")
    if words[0] == "train" and "--dry-run" not in words:
        words += shlex.split(SMALL)
    if words[0] == "push":
        words += ["--base", "org/model"]  # the run was made from a folder
    if words[0] in ("init", "import"):  # a page may show both ways to one file
        output = words[words.index("--output") + 1] if "--output" in words else "strop.yaml"
        Path(output).unlink(missing_ok=True)
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert code in GOOD.get(words[0], (0,)), f"{line}\n{out[-1000:]}\n{err[-2000:]}"
    if "--dry-run" in words:
        assert "nothing was trained" in out
    elif words[0] == "train" and "--resume" not in words:
        assert re.search(r"the model of step \d+ is in .*/final\n", out + err)


def look_at(program: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What can be said of a command without running it."""
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert f"\n{extra} = [" in project
    elif program == "python" and not re.match(r"-m sglang\.|llama\.cpp/", " ".join(words)):
        file = Path(words[1].replace(".", "/") + ".py") if words[0] == "-m" else Path(words[0])
        source = (ROOT / file).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    elif "train" in words:  # several processes: the plan of as many devices
        words = [word for word in words[words.index("train") :] if word]
        answered(program, [*without_places(words), "--dry-run", "--device", "h100", "--devices", "8"], capsys)


def without_places(words: list[str]) -> list[str]:
    """Devices are not looked for."""
    at = words.index("--device-ids") if "--device-ids" in words else None
    return words if at is None else [*words[:at], *words[at + 2 :]]


def run_block(block: Block, scope: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    if "outputs/reward" in with_stand_ins(block.text):
        kind = "true" if "Peft" in block.text else "false"
        line = f"strop train --config configs/reward.yaml --models.0.name NAME --lora.enabled {kind} --overwrite"
        run_command(line, capsys)
    if block.language == "sh" and names_a_command(block):
        program, name = block.text.split()
        known = program != "strop" or name in COMMANDS or name in ("--help", "--version")
        assert known and (program == "strop" or why_not(block.text)), block.text
    elif block.language == "sh":
        for line in commands(block):
            run_command(line, capsys)
    elif block.language == "python":
        exec(compile(block.text, "page", "exec"), scope)
    elif block.language == "yaml" and is_configuration(block.text):
        dry_run(block.text, capsys)


def dry_run(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration, or a part of one; the rest is put in."""
    shown = yaml.safe_load(text)
    fits = "sft" if "sources" in shown.get("dataset", {}) else "grpo" if "rollout" in shown else "dpo"
    method = shown.get("post_training", {}).get("method", fits)
    whole = {"models": DPO["models"], **shown, "post_training": {"method": method, **shown.get("post_training", {})}}
    if "rollout" in whole:
        whole.setdefault("rewards", ["exact_match"])
    if not {"train_file", "name", "sources"} & set(whole.get("dataset", {})):
        whole["dataset"] = {"train_file": LIKE.get(method, "pairs.jsonl"), **whole.get("dataset", {})}
    Path("block.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    answered(text, ["train", "--config", "block.yaml", "--dry-run", "--no-time"], capsys)


# ---- the pages


def stories() -> Iterator[Any]:
    """Blocks that are run one after the other in one folder."""
    for page in PAGES:
        shown = blocks_of(page)
        if page.name == "data.md":
            shown = [block for block in shown if block.in_sentence]
        alone = page.name == "README.md" or page.suffix == ".yaml"
        parts: dict[str, list[Block]] = {}
        for block in shown:
            parts.setdefault(block.section if alone else "", []).append(block)
        for name, story in parts.items():
            marks = [pytest.mark.nightly] if re.search(NIGHTLY, f"{name_of(page)}:{name}") else []
            yield pytest.param(name_of(page), story, id=name_of(page) + (f":{name[:60]}" if name else ""), marks=marks)


@pytest.mark.share(6)
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft, in a page's Python
@pytest.mark.parametrize(("page", "story"), list(stories()))
def test_what_a_page_shows_is_run(
    page: str, story: list[Block], here: Path, stand_ins: None, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {"__name__": "page", "strop": strop, "messages": MESSAGES}
    for block in story:
        if (name := file_name(block.text)) is not None:
            Path(name).write_text(block.text, encoding="utf-8")
    for block in story:
        run_block(block, scope, capsys)
    if page in LEAVES:
        LEAVES[page](scope)


def left_by_using_your_model(scope: dict[str, Any]) -> None:
    """Answers of both models, numbers, a merged model that answers as the adapted one, and the same bits after
    converting there and back."""
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    own = {"completion", "tokens", "finish"}
    assert [set(answer) for answer in answers] == 2 * [{"prompt", "sample", *own, *(f"base_{name}" for name in own)}]
    assert json.loads(Path("numbers.json").read_text())["rows"] == NUM_ROWS
    assert scope["answer"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    merged, again = (load_file(f"outputs/NAME/{name}/model.safetensors") for name in ("merged", "again"))
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)
    assert not any("lora" in name for name in merged)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        adapted, whole = (
            AutoModelForCausalLM.from_pretrained(f"outputs/NAME/{name}", dtype=torch.float32)(ids).logits
            for name in ("final", "merged")
        )
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-4)


LEAVES = {
    "docs/using-your-model.md": left_by_using_your_model,
    "docs/first-run.md": lambda _: Path("outputs/model/report.html").stat(),
}
"""What is there after the blocks of a page were run."""


def test_what_is_not_run_is_on_a_page() -> None:
    lines = [line for page in PAGES for block in blocks_of(page) for line in commands(block)]
    for pattern in NOT_RUN:
        assert any(why_not(line) == pattern for line in lines), pattern


def test_commands_are_found() -> None:
    page = "## A\n```sh\n# a\nstrop train --config a.yaml \\\n  --bf16   # x\n```\nsay `strop\ndemo`\n"
    found = list(blocks(page))
    assert [line for block in found for line in commands(block)] == ["strop train --config a.yaml --bf16", "strop demo"]
    assert [(block.section, names_a_command(block)) for block in found] == [("A", False), ("A", True)]
    assert sum(len(list(commands(block))) for page in PAGES for block in blocks_of(page)) > 150


def test_no_command_hides_in_an_indented_block() -> None:
    for page in PAGES:
        if page.suffix == ".md":
            fenced = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            assert not re.findall(r"^ {4}(?:strop|make|torchrun|pip|python) .*$", fenced, flags=re.MULTILINE), page
