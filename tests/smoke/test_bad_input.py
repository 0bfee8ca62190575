"""A hostile user at the command line: one clear message, exit code 1, and nothing on the disk has changed."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from safetensors.torch import load_file, save_file

from strop import cli, terminal
from strop.data.read import sources
from strop.data.read.row import Row
from strop.rundir import RunDir

RECIPE = "--max-steps 3 --gradient-accumulation-steps 1 --warmup-steps 0 --max-seq-length 64 --output-dir out"
SFT = f"--model model --train-file sft.jsonl {RECIPE}"
DPO = f"--method dpo --model model --train-file dpo.jsonl {RECIPE}"
RUN = Path("out/model")

Prepare = Callable[[], object]


@dataclass(frozen=True)
class Answer:
    """What the command line did: exit code, its messages, and all that it wrote to stderr and stdout."""

    code: int
    messages: list[str]
    log: str
    out: str


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    """A working folder with a model, rows, and a finished run with the checkpoints 1, 2 and 3."""
    folder: Path = tmp_path_factory.mktemp("ground")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    single = [{"prompt": f"question {i}", "completion": "yes " * (1 + i % 3)} for i in range(8)]
    pairs = [{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no maybe"} for i in range(8)]
    (folder / "sft.jsonl").write_text(lines(*single))
    (folder / "dpo.jsonl").write_text(lines(*pairs))
    (folder / "file").write_text("a file")
    with chdir(folder):
        assert cli.main(shlex.split(f"train {SFT} --save-steps 1")) == 0
    (folder / "out").rename(folder / "finished")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], Answer]:
    """Runs a command line in this process."""

    def answer(line: str) -> Answer:
        said: list[str] = []
        complain = terminal.complain
        with monkeypatch.context() as patch:
            patch.setattr("strop.cli.entry.complain", lambda message: (said.append(message), complain(message)))
            code = cli.main(shlex.split(line))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Answer(code, said, captured.err, captured.out)

    return answer


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tree(folder: Path = Path()) -> dict[str, bytes | None]:
    """Every file with its content, every folder."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def write(name: str, content: str | bytes) -> Prepare:
    def prepare() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def remove(*names: str) -> Prepare:
    return lambda: [Path("model", name).unlink() for name in names]


def edit(name: str, **changes: Any) -> Prepare:
    """Change keys of a JSON file of the model; None removes a key."""

    def prepare() -> None:
        path = Path("model", name)
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return prepare


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Prepare:
    def prepare() -> None:
        tensors = load_file("model/model.safetensors")
        change(tensors)
        save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})

    return prepare


UP = "model.layers.0.mlp.up_proj.weight"


def pickle_weights() -> None:
    torch.save(load_file("model/model.safetensors"), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()


def cut_in_half() -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:100_000])


def larger_tokenizer() -> None:
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{**token, "id": 350 + i, "content": f"<extra{i}>"} for i in range(99)]
    path.write_text(json.dumps(content))


def unfinished(*, damaged: str | None = None) -> Prepare:
    """A run that died after step 3; a file of its last checkpoint can be damaged."""

    def prepare() -> None:
        shutil.copytree("finished", "out")
        shutil.rmtree(RUN / "final")
        if damaged is not None:
            path = RUN / "checkpoint-3" / damaged
            path.write_bytes(path.read_bytes()[:-5])

    return prepare


@dataclass(frozen=True)
class Case:
    """line: the flags of `strop train`. said: what the one message holds. prepare: what is done before."""

    line: str
    said: tuple[str, ...]
    prepare: tuple[Prepare, ...] = field(default=())


def case(line: str, *said: str, prepare: Prepare | None = None) -> Case:
    return Case(line, said, () if prepare is None else (prepare,))


def config(text: str, *said: str) -> Case:
    return case("--config c.yaml", *said, prepare=write("c.yaml", text))


def model(prepare: Prepare, *said: str) -> Case:
    return case(SFT, "model model (model): ", *said, prepare=prepare)


def named(model: str, *said: str) -> Case:
    return case(SFT.replace("--model model", f"--model {shlex.quote(model)}"), *said)


def data(name: str, content: str | bytes, *said: str, line: str = SFT) -> Case:
    return case(re.sub(r"\w+\.jsonl", name, line), *said, prepare=write(name, content))


GOOD = {"prompt": "a b", "completion": "c d"}
PAIR = {"prompt": "a b", "chosen": "c d", "rejected": "e f"}
NO_HUB = ("here, and the hub could not be asked for it: HF_HUB_OFFLINE is set", "without a network, download the model")
MODELS = "models: [{huggingface_id: model}]\n"

CASES = {
    # ---- the configuration
    "no such configuration": case("--config gone.yaml", "gone.yaml: ", "No such file", "check the path"),
    "a folder as configuration": case("--config model", "model: this is a folder", "a YAML file"),
    "broken YAML": config("models:\n  - huggingface_id: [a\ntraining: {", "c.yaml:3: not valid YAML"),
    "binary YAML": config("\0\1\2", "c.yaml:1: a NUL byte", "UTF-8 text"),
    "empty YAML": config("", "c.yaml: the configuration is empty"),
    "one word": config("hello", "c.yaml: the configuration is a single value"),
    "an unknown section": config(
        f"{MODELS}traning:\n  x: 1\n", "c.yaml:2: unknown key traning", "did you mean training?"
    ),
    "an unknown key": config(
        f"{MODELS}training:\n  epochs: 1\n", "c.yaml:3: unknown key training.epochs", "num_epochs"
    ),
    "a wrong type": config(f"{MODELS}training:\n  num_epochs: two\n", "c.yaml:3", "'two' (text)", "a whole number"),
    "two problems at once": config(
        f"{MODELS}a: 1\ntraining:\n  fp16: maybe\n", "2 problems", "unknown key a", "'maybe'"
    ),
    "no model": case("--train-file sft.jsonl", "no model is given", "--model org/model"),
    "an unknown preset": case(f"{SFT} --preset gpu", "there is no preset 'gpu'", "gpu-bf16"),
    "an unknown flag": case(f"{SFT} --lerning-rate 1", "unknown flag --lerning-rate", "did you mean --learning-rate?"),
    "a flag of the wrong type": case(f"{SFT} --num-epochs two", "--num-epochs: training.num_epochs is 'two' (text)"),
    "a flag twice": case(f"{SFT} --max-steps 4", "--max-steps and --max-steps", "given twice", "keep one"),
    "a flag without its value": case(f"{SFT} --seed", "--seed needs a value", "a whole number"),
    "bf16 and fp16": case(f"{SFT} --bf16 --fp16", "--bf16 and --fp16", "at most one of them"),
    "warm-up twice": case(f"{SFT} --warmup-ratio 0.1", "--warmup-ratio and --warmup-steps", "remove one"),
    "a setting of another method": case(f"{SFT} --beta 0.1", "method sft does not read it", "set method: dpo"),
    "a setting of another loss": case(
        f"{DPO} --loss-type hinge --label-smoothing 0.1", "loss_type hinge does not read it"
    ),
    "a forbidden reference": case(f"{DPO} --ref-model-id a/b --no-use-ref-model", "while use_ref_model is false"),
    "a prompt that takes all": case(f"{SFT} --max-prompt-length 64", "leaves no token for a completion"),
    "an unknown method": case(f"{SFT} --method ppo", "post_training.method is 'ppo'", "one of sft, dpo"),
    "no learning rate": case(f"{SFT} --learning-rate 0", "training.learning_rate is 0", "a number above 0"),
    "an infinite learning rate": case(f"{SFT} --learning-rate .inf", "learning_rate is inf", "a finite number"),
    "a tracker that strop does not have": case(f"{SFT} --report-to neptune", "['neptune']", "wandb", "remove neptune"),
    "a model that is not there": case(f"{SFT} --model-index 9", "--model-index: there is no model 9", "0 = model"),
    "a metric that nobody measures": case(
        f"{SFT} --metric-for-best-model nonsense", "no evaluation has a metric 'nonsense'", "one of loss, "
    ),
    "a rank beyond everything": case(f"{SFT} --lora.r 9223372036854775807", "lora.r is 9223372036854775807", "65536"),
    "a module in two lists": case(
        f"{SFT} --lora.target_modules [q_proj,up_proj] --modules-to-save [up_proj]", "up_proj stands in target_modules"
    ),
    "a model before the first": case(f"{SFT} --model-index -1", "--model-index: there is no model -1"),
    "a token in the configuration": case(f"{SFT} --revision hf_{'a1B2c3D4' * 5}", "access token", "HF_TOKEN"),
    "one name for two models": config(
        "models: [{huggingface_id: a/x}, {huggingface_id: b/x}]\n", "both named 'x'", "its own `name:`"
    ),
    "the best model by nothing": case(f"{SFT} --validation-split 0 --load-best-model-at-end", "no validation rows"),
    # ---- the model
    "a path that is none": named("./gone", "model gone (./gone): there is no such folder", "check the path"),
    "a deep path that is none": named("/a/b/c", "there is no such folder"),
    "a home that is none": named("~nobody/x", "there is no such folder"),
    "a file as model": named("file", "the path is a file", "config.json"),
    "a hub id offline": named("org/model", "model model (org/model): there is no folder 'org/model' ", *NO_HUB),
    "a folder's name misspelt": named("modell", "there is no folder 'modell' ", *NO_HUB),
    "no hub id": named("bad id!/x", "model x (bad id!/x): ", "Repo id must use", "check the name"),
    "a line break in a name": named("org/a\nb", "cannot be the name of a folder", "give the model a `name:`"),
    "no configuration": model(remove("config.json"), "there is no config.json"),
    "a broken configuration": model(write("model/config.json", "{"), "config.json cannot be read"),
    "heads that do not divide": model(
        edit("config.json", num_attention_heads=5), "config.json does not describe a model"
    ),
    "no tokenizer": model(remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer.json", "copy the tokenizer"),
    "a broken tokenizer": model(write("model/tokenizer.json", "{"), "its tokenizer cannot be loaded"),
    "no end token": model(edit("tokenizer_config.json", eos_token=None), "no end-of-sequence token", '"eos_token"'),
    "a tokenizer that is too large": model(
        larger_tokenizer,
        "tokens without an embedding",
        "with id 400",
        "ids below 400, the rows of the model's embedding",
    ),
    "a broken chat template": case(
        SFT,
        "chat template is broken",
        "(line 1)",
        "fix the chat template",
        prepare=write("model/chat_template.jinja", "{% for m in %}"),
    ),
    "an unknown architecture": model(edit("config.json", model_type="lama"), "'lama' is unknown", "such as 'llama'"),
    "no architecture": model(edit("config.json", model_type=None), "names no model_type"),
    "another kind of model": model(
        edit("config.json", model_type="t5"), "encoder-decoder", "choose a decoder-only model"
    ),
    "no weights": model(remove("model.safetensors"), "there are no weights", "model.safetensors"),
    "pickled weights": model(pickle_weights, "pickles (pytorch_model.bin)", "model.safetensors", "convert them"),
    "half of the weights": model(cut_in_half, "model.safetensors is damaged", "copy the file again"),
    "a missing tensor": model(
        edit_weights(lambda t: t.pop(UP)), "1 weights are missing", UP, "download the model again"
    ),
    "a NaN": model(edit_weights(lambda t: t[UP].fill_(torch.nan)), f"{UP} holds NaN", "finite weights"),
    "another shape": model(edit_weights(lambda t: t.update({UP: torch.ones(3, 32)})), f"{UP}: [3, 32]", "[48, 32]"),
    "an adapter that is none": case(
        f"{SFT} --adapter ./gone", "adapter ./gone: there is no such folder", "check the path"
    ),
    "an adapter offline": case(f"{SFT} --adapter org/adapter", "adapter org/adapter: ", *NO_HUB),
    "a model as adapter": case(f"{SFT} --adapter model", "there is no adapter_config.json"),
    "a reference offline": case(f"{DPO} --ref-model-id org/r", "reference model r (org/r): ", *NO_HUB),
    "unknown modules": case(f"{SFT} --target-modules nope", "no linear layer is called 'nope'", "q_proj"),
    "an unknown attention": case(f"{SFT} --attn-implementation no", "cannot be loaded", "models[].attn_implementation"),
    # ---- the rows
    "no such data": case(SFT.replace("sft.", "gone."), "gone.jsonl: there is no such file", "check the path"),
    "a data set offline": case(
        f"--model model --dataset.name org/rows {RECIPE}",
        "dataset.name: org/rows",
        "on the Hub",
        "offline, download it",
    ),
    "no data": case(f"--model model {RECIPE}", "no training data is named", "dataset.train_file"),
    "a folder as data": case(SFT.replace("sft.jsonl", "model"), "model: this is a folder", "name a file in it"),
    "a splits folder that is none": case(
        f"--model model --splits-dir gone {RECIPE}", "splits_dir: gone: there is no such folder"
    ),
    "a splits folder without splits": case(
        f"--model model --splits-dir model {RECIPE}",
        "model: train.jsonl is not in the folder",
        "set dataset.train_file",
    ),
    "an unknown format": case(SFT.replace("sft.jsonl", "file"), "file: the extension", ".jsonl, .json, .csv, .parquet"),
    "empty data": data("e.jsonl", "", "e.jsonl: there are no rows"),
    "blank data": data("e.jsonl", "\n \n\n", "e.jsonl: there are no rows"),
    "empty CSV": data("e.csv", "prompt,completion\n", "e.csv: there are no rows"),
    "no valid row": data("b.jsonl", "{a\n{b\n", "b.jsonl:1: the line is not JSON", "one JSON object on one line"),
    "no valid row, skipped": data(
        "b.jsonl", "{a\n{b\n", "all 2 rows are bad (2 invalid_json)", line=f"{SFT} --on-error skip"
    ),
    "two equal sides": data(
        "p.jsonl", lines(PAIR, {**PAIR, "rejected": "c d"}), "p.jsonl:2: chosen and rejected are the same", line=DPO
    ),
    "prompts to be dropped": data(
        "l.jsonl",
        lines(*[{**GOOD, "prompt": "hello " * 200}] * 3),
        "all 3 rows are dropped (3 prompt_too_long)",
        "training.max_prompt_length 32",
        "raise the limit",
        line=f"{SFT} --filter-overlength-samples",
    ),
    "sides that are equal when cut": data(
        "l.jsonl",
        lines(*[{"prompt": "a", "chosen": "yes " * 99 + "1", "rejected": "yes " * 99 + "2"}] * 3),
        "all 3 rows are dropped (3 equal_after_truncation)",
        "raise training.max_completion_length",
        line=DPO,
    ),
    "pairs for sft": data("p.jsonl", lines(PAIR), "p.jsonl:1: ", "it is a preference pair", "method: dpo"),
    "singles for dpo": data("s.jsonl", lines(GOOD), "s.jsonl:1: ", "nothing to compare", "method: sft", line=DPO),
    "labels for sft": data("k.jsonl", lines({**GOOD, "label": True}), "k.jsonl:1: ", "unpaired preference row"),
    "another shape of rows": data("x.jsonl", lines({"words": "a"}), "x.jsonl:1: 'prompt' is missing", "has 'words'"),
    "a picture as data": data("x.jsonl", b"\x89PNG\r\n\x1a\n", "x.jsonl:1: the bytes b'\\x89'", "UTF-8 text"),
    "noise as CSV": data("x.csv", bytes(range(128, 256)), "x.csv:1: the file is not UTF-8"),
    "noise as Parquet": data("x.parquet", bytes(99), "x.parquet:1: the Parquet file cannot be read"),
    "noise as gzip": data("x.jsonl.gz", b"noise", "x.jsonl.gz: the file cannot be read", "gzip"),
    "half a JSON array": data("x.json", '[{"prompt": "a"', "x.json:1: the JSON array is broken", "fix the file"),
    "validation rows of another kind": case(f"{SFT} --val-file dpo.jsonl", "dpo.jsonl:1: ", "it is a preference pair"),
    "no validation rows": case(f"{SFT} --val-file e.jsonl", "e.jsonl: there are no rows", prepare=write("e.jsonl", "")),
    # ---- the folder
    "a file as output": case(SFT.replace("dir out", "dir file"), "file/model: ", "file is in the way", "output_dir"),
    "a folder below a file": case(SFT.replace("dir out", "dir file/x"), "file/x/model: ", "file is in the way"),
    "a file as run folder": case(SFT, "out/model: ", "out/model is in the way", prepare=write("out/model", "x")),
    "a folder of the system": case(
        SFT.replace("dir out", "dir /proc/x"), "/proc/x", "a folder of the operating system"
    ),
    "the home folder": case(SFT.replace("dir out", "dir '~'"), "your home folder itself", "~/outputs"),
    "a log folder elsewhere": case(f"{SFT} --logging-dir ../../file", "leads out of training.output_dir"),
    "a log folder in the way": case(f"{SFT} --logging-dir final", "a name that the run folder has for something else"),
    "another run": case(
        SFT, "out/model: the folder holds another run: ", "checkpoint-3", "--resume", prepare=unfinished()
    ),
    "a foreign configuration": case(
        SFT, "holds another run: config.yaml", "--overwrite", prepare=write("out/model/config.yaml", "mine")
    ),
    "overwriting with a slip": case(
        f"{SFT} --overwrite".replace("sft.", "gone."), "there is no such file", prepare=unfinished()
    ),
    "overwriting with a broken model": case(
        f"{SFT} --overwrite --target-modules nope", "no linear layer", prepare=unfinished()
    ),
    # ---- resuming
    "both ways on": case(f"{SFT} --resume --overwrite", "--resume and --overwrite", "choose one"),
    "a checkpoint that is not there": case(
        f"{SFT} --resume gone", "gone: there is no such folder", "a checkpoint-{step}"
    ),
    "a file as checkpoint": case(f"{SFT} --resume file", "file: there is no such folder"),
    "a model as checkpoint": case(f"{SFT} --resume model", "MANIFEST.json: missing", "name another checkpoint"),
    "a damaged checkpoint": case(
        f"{SFT} --resume {RUN}/checkpoint-3",
        f"{RUN}/checkpoint-3: the checkpoint cannot be used: state.json: ",
        "name another checkpoint",
        prepare=unfinished(damaged="state.json"),
    ),
    "a resume with other settings": case(
        f"{SFT} --resume --learning-rate 1e-3",
        "learning_rate: 2e-05 then, 0.001 now",
        "--allow-changes",
        prepare=unfinished(),
    ),
    "a resume with other data": case(
        f"{SFT} --resume --validation-split 0.5", "data: the training or validation groups", prepare=unfinished()
    ),
    "a resume with other weights": case(
        f"{SFT} --resume --r 4 --allow-changes", "its tensors are not those of this run", prepare=unfinished()
    ),
}


def refused_and_unchanged(case: Case, run: Callable[[str], Answer], flags: str = "") -> None:
    for prepare in case.prepare:
        prepare()
    before = tree()
    answer = run(f"train {case.line} {flags}")
    assert answer.code == 1
    (message,) = answer.messages
    assert answer.log.endswith(message + "\n") and ("--dry-run" in flags or answer.out == "")
    for part in case.said:
        assert part in message
    assert "  expected: " in message or "  to do:    " in message
    assert len(message) < 1500
    assert tree() == before


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message_and_nothing_changed(name: str, here: Path, run: Callable[[str], Answer]) -> None:
    refused_and_unchanged(CASES[name], run)


@pytest.mark.parametrize(
    "name",
    [
        "an unknown key",
        "a hub id offline",
        "no tokenizer",
        "a tokenizer that is too large",
        "an unknown architecture",
        "pickled weights",
        "half of the weights",
        "no such data",
        "another shape of rows",
        "a metric that nobody measures",
        "a file as output",
        "a folder below a file",
    ],
)
def test_a_dry_run_refuses_it_too(name: str, here: Path, run: Callable[[str], Answer]) -> None:
    """What can be known without reading the weights."""
    refused_and_unchanged(CASES[name], run, "--dry-run")


# ---- what is no mistake, and is said


def test_long_prompts_are_cut_and_counted(here: Path, run: Callable[[str], Answer]) -> None:
    write("l.jsonl", lines(*[{**GOOD, "prompt": "hello " * 200}] * 3))()
    answer = run(f"train {SFT.replace('sft.', 'l.')}")
    assert answer.code == 0
    assert "train: 2 prompts cut at the left" in answer.log
    assert json.loads((RUN / "data.json").read_text())["splits"]["train"]["prompts_cut"] == 2


def test_a_resume_with_nothing_there_starts(here: Path, run: Callable[[str], Answer]) -> None:
    answer = run(f"train {SFT} --resume")
    assert answer.code == 0 and "no checkpoint in" in answer.log and "starting" in answer.log
    assert (RUN / "final").is_dir()


def test_a_resume_of_a_finished_run_says_so(here: Path, run: Callable[[str], Answer]) -> None:
    shutil.copytree("finished", "out")
    before = tree()
    answer = run(f"train {SFT} --resume")
    assert answer.code == 0 and "is finished: its model is in" in answer.log
    assert tree() == before


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(here: Path, run: Callable[[str], Answer]) -> None:
    unfinished(damaged="state.json")()
    answer = run(f"train {SFT} --resume")
    assert answer.code == 0
    assert "checkpoint-3 is damaged and not used: state.json: " in answer.log
    assert re.search(r"resuming from .+checkpoint-2\n", answer.log)
    one, two = (load_file(Path(folder, "model/final/model.safetensors")) for folder in ("out", "finished"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert (RUN / ".bad-checkpoint-3" / "state.json").is_file()


def test_foreign_files_stay(here: Path, run: Callable[[str], Answer]) -> None:
    foreign = ("notes.txt", "checkpoint-best/weights", "logs/mine.log", "final.bak/x")
    for name in foreign:
        write(str(RUN / name), "precious")()
    for line in (SFT, f"{SFT} --overwrite"):
        assert run(f"train {line}").code == 0
        assert all((RUN / name).read_text() == "precious" for name in foreign)
        assert (RUN / "final").is_dir()


def test_models_that_are_not_there_stop_all_before_the_first_trains(here: Path, run: Callable[[str], Answer]) -> None:
    write("c.yaml", "models: [{huggingface_id: model}, {huggingface_id: ./gone}, {huggingface_id: ./lost}]\n")()
    answer = run(f"train --config c.yaml --train-file none.jsonl {RECIPE}")
    assert answer.code == 1 and not RUN.parent.exists()
    (message,) = answer.messages
    assert message.startswith("3 things that the configuration names cannot be used\n")
    for found in ("- model gone (./gone): there is no such folder", "- model lost (./lost): there is no such folder"):
        assert found in message
    assert "- none.jsonl: there is no such file" in message


def test_one_of_several_models_fails(here: Path, run: Callable[[str], Answer]) -> None:
    shutil.copytree("model", "broken")
    weights = Path("broken", "model.safetensors").read_bytes()
    Path("broken", "model.safetensors").write_bytes(weights[: len(weights) // 2])
    write("c.yaml", "models: [{huggingface_id: ./broken}, {huggingface_id: model}]\n")()
    answer = run(f"train --config c.yaml --train-file sft.jsonl {RECIPE}")
    assert answer.code == 1
    assert "error: broken failed: model broken (./broken): model.safetensors is damaged" in answer.log
    assert answer.messages[0].startswith("1 of 2 models failed: broken: model broken (./broken): model.safetensors is")
    assert (RUN / "final").is_dir() and not (RUN.parent / "broken").exists()


# ---- two at once, signals, full disks


def test_two_runs_on_one_folder(here: Path, run: Callable[[str], Answer]) -> None:
    with RunDir.open(RUN, resume=False, overwrite=False) as first:
        first.write_text("config.yaml", "the first")
        before = tree()
        for flags in ("", "--resume", "--overwrite"):
            answer = run(f"train {SFT} {flags}")
            assert answer.code == 1
            assert f"another run is using the folder: process {os.getpid()} on host" in answer.messages[0]
            assert "wait for it, stop it" in answer.messages[0]
            assert tree() == before


def test_control_c_while_rows_are_read(
    here: Path, run: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sources.read_lines

    def interrupted(path: str) -> Iterator[Row]:
        for number, row in enumerate(read(path)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield row

    monkeypatch.setattr(sources, "read_lines", interrupted)
    monkeypatch.setenv("STROP_CACHE", str(here.parent / "cache"))  # else they need not be read
    before = tree()
    answer = run(f"train {SFT}")
    assert answer.code == 130
    assert answer.messages == [f"stopped; what is in no checkpoint is lost\ngo on with: strop train {SFT} --resume"]
    assert tree() == before


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """No file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "said", "to_do"),
    [
        (1_000, "config.yaml: cannot be written: File too large\n", "ulimit -f"),
        (100_000, "final: the final model could not be written: ", "then --resume"),
    ],
)
def test_a_full_disk(
    size: int, said: str, to_do: str, here: Path, run: Callable[[str], Answer], disk_full: Callable[[int], None]
) -> None:
    disk_full(size)
    answer = run(f"train {SFT} --save-steps 2")
    disk_full(resource.RLIM_INFINITY)
    assert answer.code == 1
    (message,) = answer.messages
    assert said in message and to_do in message
    assert not [p for p in RUN.rglob("*") if p.name.startswith(".tmp")]
    assert not (RUN / "final").exists()
    assert run(f"train {SFT} --resume").code == 0  # the way on that it names
    assert (RUN / "final").is_dir()


# ---- who listens


def stdout_to(path: str | int, monkeypatch: pytest.MonkeyPatch) -> TextIO:
    stream = open(path, "w")  # noqa: SIM115 (the caller closes it)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize("line", [f"train {SFT} --dry-run", "train --help", "--help", "schema"])
def test_a_reader_that_has_left_is_no_error(
    line: str, here: Path, run: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with stdout_to(writer, monkeypatch):
        answer = run(line)
    assert answer.code == 0 and answer.messages == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", [f"train {SFT} --dry-run", "--help"])
def test_output_to_a_full_disk(
    line: str, here: Path, run: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stdout_to("/dev/full", monkeypatch):
        answer = run(line)
    assert answer.code == 1
    assert answer.messages[0].startswith("standard output cannot be written: No space left on device")


def test_text_that_the_terminal_cannot_show(
    here: Path, run: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("u.jsonl", lines({"prompt": "\u00fc \u65e5", "completion": "\U0001f600"}))()
    with open("shown", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(f"train {SFT.replace('sft.', 'u.')} --dry-run").code == 0
    assert "\\xfc \\u65e5" in Path("shown").read_text()


@pytest.mark.nightly
def test_a_bare_environment(here: Path) -> None:
    """No home, locale C, both outputs closed, a path with blanks, umlauts and a line break."""
    folder = here / "a b\n\u00fc"
    folder.mkdir()
    for name in ("model", "sft.jsonl"):
        (here / name).rename(folder / name)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = shlex.join([sys.executable, "-m", "strop", "train", *shlex.split(SFT)])
    done = subprocess.run(["sh", "-c", f"{line} >&- 2>&-"], cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0
    assert (folder / RUN / "final" / "model.safetensors").is_file()
    assert [json.loads(record)["split"] for record in (folder / RUN / "metrics.jsonl").read_text().splitlines()][
        -1
    ] == "eval"
