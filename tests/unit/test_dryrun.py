"""The dry run: the example first, the processor timed last, no weights needed, other machines judged."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from strop.config import RunConfig, load_config, to_yaml
from strop.config.methods import SftSettings
from strop.dryrun import dry_run
from strop.errors import ConfigError
from strop.machine import GPUS, bytes_of, machine_named


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"question {i}", "chosen": "yes " * (2 + i), "rejected": "no"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(
        overrides={
            "models": [{"huggingface_id": str(model_dir), "name": "tiny"}],
            "dataset.train_file": "rows.jsonl",
            "post_training.method": "dpo",
        }
    )


ORDER = (
    "== tiny",
    "The first example",
    "«yes yes ",
    "train: 7 of 7 rows",
    "effective batch",
    "predicted peak memory",
    "The configuration",
    "training.learning_rate",
    "timing layers",
    "predicted time",
    "dry run: nothing was trained",
)


def test_what_is_known_early_is_shown_early(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(config)
    shown = capsys.readouterr().out
    places = [shown.index(words) for words in ORDER]
    assert places == sorted(places) and shown.count("predicted time") == 1


def test_the_example_is_shown_before_all_rows_are_read(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: Any) -> None:
        assert "«yes yes " in capsys.readouterr().out
        raise InterruptedError

    monkeypatch.setattr("strop.modelrows.load_data", look)
    with pytest.raises(InterruptedError):
        dry_run(config)


HEAVY = (
    "peft",
    "bitsandbytes",
    "datasets",
    "transformers.modeling_utils",
    "transformers.activations",
    "torch._dynamo",
    "strop.estimate",
    "strop.session",
    "strop.policy.policy",
    "strop.engine.loop",
)


@pytest.mark.nightly
def test_the_example_needs_no_model_classes_and_no_adapters(config: RunConfig) -> None:
    """They take as long to import as all before them, and the example is shown without."""
    script = f"""
import sys
from strop import dryrun
from strop.config import load_config

def show(*args, **options):
    sys.exit(" ".join(name for name in {HEAVY} if name in sys.modules))

dryrun.show_group = show
dryrun.dry_run(load_config("run.yaml"))
"""
    Path("run.yaml").write_text(to_yaml(config))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.stderr.strip(), done.returncode) == ("", 1)  # `sys.exit` of a text gives 1: the example was reached


def test_the_oddest_row_of_each_kind_is_shown_with_what_was_left_out(
    config: RunConfig, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
        "{{ (m.content or '') }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    (model_dir / "chat_template.jinja").write_text(template)
    u, a = {"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}
    thinks, call = {**a, "reasoning_content": "hm"}, {"function": {"name": "add", "arguments": {"n": 1}}}
    long = {"messages": [u, {**a, "content": "the fox " * 60}]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows: list[dict[str, Any]] = [
        {"messages": [{**u, "lang": "en"}, a]},
        long,
        {"messages": [u, thinks, u, thinks]},
        {"messages": [u, {**a, "tool_calls": [call]}, {"role": "tool", "content": "2"}, a], "tools": tools},
        {"messages": [{**u, "lang": "en", "mood": "glad"}, a], "chat_template_kwargs": {"deep": True}},
        {"messages": [{"role": "system", "content": "s"}, u, a], "system": "other"},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"post_training": SftSettings(), "dataset.validation_split": 0.0}
    for path in ("rows.jsonl", "rows.json"):
        Path("rows.json").write_text(json.dumps(rows, indent=1))
        dry_run(config.with_values({**values, "dataset.train_file": path}, "test"), timed=False)
        shown = capsys.readouterr().out
        parts = shown[: shown.index("text: 6 rows")].split(", trained tokens marked:\n")
        titles = [part.rpartition("\n")[2] for part in parts[:-1]]
        gone = [part.partition("left out: ")[2].partition("\n")[0] for part in parts[1:]]
        found = {title.partition(", ")[2]: words for title, words in zip(titles, gone, strict=True)}
        assert gone[0] == "'lang' of turn 1", found  # the first example
        assert found.get("the longest") == "", found
        assert found["with answers that are not trained; with reasoning"] == "the reasoning of turn 2"
        assert found["with tools"] == ""
        assert found["of which strop leaves a part out"] == "the system column"


def test_the_processor_is_not_timed_where_nobody_asks(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strop.estimate.seconds.measure", lambda *_: pytest.fail("timed"))
    dry_run(config, timed=False)
    dry_run(config, device="h100")  # which is not here to be timed
    assert "timing layers" not in capsys.readouterr().out


def test_config_json_is_enough(config: RunConfig, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_dir / "model.safetensors").unlink()
    dry_run(config, timed=False)
    shown = capsys.readouterr().out
    assert "there are no weights in" in shown and "predicted peak memory" in shown


def test_another_machine_is_judged(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(config, timed=False, memory=24 * 2**30)
    assert " of 24.0 GiB " in capsys.readouterr().out
    dry_run(config, device="H100")
    assert " of 79.6 GiB " in (shown := capsys.readouterr().out)
    assert "predicted time" in shown and "judged for another machine: H100" in shown
    dry_run(config, device="h100", memory=2**20)  # a card that nothing fits on
    assert "will hardly fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="does not compute bfloat16"):
        dry_run(config.with_values({"training.bf16": True}, "test"), device="t4")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.word)
def test_every_gpu_of_the_table_has_a_name_and_numbers_that_can_be(gpu: Any) -> None:
    machine = machine_named(gpu.word.lower())
    assert machine.name == gpu.word and machine.memory == int(gpu.gib * 2**30)
    assert 8 < gpu.gib < 300 and gpu.full < gpu.low and machine.has_bf16 is gpu.has_bf16


def test_a_device_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="there is no device 'h1000'") as caught:
        machine_named("h1000")
    assert "h100" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24 gib", 24 * 2**30), ("16GB", 16 * 10**9), ("512MiB", 2**29), ("1.5GiB", 3 * 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24", "", "GiB", "-1GiB", "0GiB", "24KiB", "1e3GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--device-memory"):
        bytes_of(text)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_table_of_values_fits_the_terminal(width: int, config: RunConfig) -> None:
    long = {"training.output_dir": "./" + "a-long-name/" * 9, "dataset.max_samples": 5}
    told = io.StringIO()
    dry_run(
        config.with_values(long, "where it came from, in many words that need more than a line of an old terminal"),
        timed=False,
        console=Console(file=told, force_terminal=True, width=width, soft_wrap=True, color_system=None),
    )
    table = told.getvalue().partition("where it came from\n\n")[2].partition("\ndry run")[0]
    lines = table.splitlines()
    assert max(map(len, lines)) <= width
    begun = [line.split()[0] for line in lines if line[:1].strip()]
    assert {"training.output_dir", "dataset.max_samples", "training.learning_rate"} <= set(begun)
    assert {key for key in begun if "." not in key} <= {"rewards", "seed"}  # what goes on below stands in its column
