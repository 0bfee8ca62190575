"""Kills, damages, full disks and hostile model folders, drawn by seed: each ends in the same result or in one message.

A few of each in the normal suite; `make nightly` draws as many as the second number of each kind says, and
STROP_ATTACKS=N as many as one likes. At its end pytest prints how many there were, by outcome.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import strop
from strop import durable
from strop.errors import StropError
from strop.policy.policy import Policy

KEYS = {"training.save_steps": 1, "training.save_total_limit": 2, "training.reference_store": True}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def few_or(many: int) -> Any:
    few = int(os.environ.get("STROP_ATTACKS", 3))
    return pytest.mark.parametrize("num", [few, pytest.param(many, marks=pytest.mark.nightly)])


@pytest.fixture(autouse=True)
def _own_cache_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def outcome(work: Callable[[], Any]) -> str:
    """What became of it; whatever is no error of strop's comes through."""
    try:
        work()
    except StropError as error:
        assert str(error).strip()
        return type(error).__name__
    return "done"


# ---- kills


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed on POSIX alone")


@posix
@few_or(1000)
@pytest.mark.parametrize("overwrites", [False, True], ids=["resume", "overwrite"])
def test_kills(overwrites: bool, num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    unbroken, other = runs(KEYS), runs(KEYS, learning_rate=3e-3)
    length = (time.monotonic() - started) / 2
    seen: Counter[str] = Counter()
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(KEYS)
        folder = Path(config.training.output_dir) / "run"
        if overwrites:
            shutil.copytree(other.path, folder)
        for _ in range(rng.choice((1, 1, 2, 3))):
            killed(config, overwrites and not _has_begun(folder, other.path), rng.uniform(0, 1.2 * length))
        took = outcome(lambda config=config: strop.train(config, resume="auto"))
        run = runs.at(folder)
        if took == "done":
            assert runs.same_run(run, unbroken), seed
        else:  # it died before it had said what it would do: the old run is whole, and is not taken for the new one
            assert overwrites and runs.same_run(run, other), seed
        seen[took] += 1
    assert seen["done"]
    record_property("attack", f"kills ({'overwrite' if overwrites else 'resume'}): {num}, {dict(seen)}")


def _has_begun(folder: Path, old: Path) -> bool:
    file = folder / "config.yaml"
    return not file.exists() or file.read_bytes() != (old / "config.yaml").read_bytes()


def killed(config: strop.RunConfig, overwrite: bool, seconds: float) -> None:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            strop.train(config, resume=None if overwrite else "auto", overwrite=overwrite)
            code = 0
        except StropError:
            code = 1
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1, -signal.SIGKILL)


# ---- damages


@few_or(1000)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_damages(
    finished: bool, num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    config = runs.config(KEYS)
    (done,) = strop.train(config)
    whole = runs.at(done.run_dir)
    kept, cache = tmp_path / "kept", tmp_path / "cache"
    if not finished:
        shutil.rmtree(done.final)
        shutil.rmtree(done.run_dir / "checkpoint-4")
    unbroken = runs(KEYS)
    places = (done.run_dir, cache)
    for number, place in enumerate(places):
        shutil.copytree(place, kept / str(number))
    seen: Counter[str] = Counter()
    for seed in range(num):
        rng = random.Random(seed)
        for number, place in enumerate(places):
            shutil.rmtree(place)
            shutil.copytree(kept / str(number), place)
        file = rng.choice(sorted(p for p in rng.choice(places).rglob("*") if p.is_file()))
        how = damage(file, rng)
        took = outcome(lambda: strop.train(config, resume="auto"))
        if took == "done":
            assert runs.same(whole.final, unbroken.final), (seed, file, how)
        seen[f"{how}: {took}"] += 1
    record_property("attack", f"damages: {num}, {dict(seen)}")


def damage(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    how = rng.choice(("flip", "cut", "empty", "delete", "extend", "noise")) if content else "delete"
    match how:
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            del content[rng.randrange(len(content)) :]
        case "empty":
            content.clear()
        case "extend":
            content += rng.randbytes(rng.randrange(1, 100))
        case "noise":
            at = rng.randrange(len(content))
            content[at : at + 16] = rng.randbytes(16)
        case _:
            file.unlink()
            return how
    file.write_bytes(content)
    return how


# ---- full disks


@few_or(200)
def test_full_disks(num: int, record_property: Any, runs: Any, watched: pytest.MonkeyPatch) -> None:
    unbroken = runs(KEYS)
    seen: Counter[str] = Counter()
    for seed in range(num):
        rng = random.Random(seed)
        config = runs.config(KEYS)
        with full_disk(watched, rng):
            took = outcome(lambda config=config: strop.train(config))
        seen[took] += 1
        if took != "done":
            again = outcome(lambda config=config: strop.train(config, resume="auto"))
            assert again == "done", (seed, took)
        run = runs.at(Path(config.training.output_dir) / "run")
        assert runs.same(run.final, unbroken.final), seed
    record_property("attack", f"full disks: {num}, {dict(seen)}")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> Iterator[None]:
    """From one write on, for some writes; and perhaps in what transformers writes itself."""
    first = rng.randrange(60)
    last = first + rng.choice((1, 5, 1000))
    write, save, count = durable._write_all, Policy.save_pretrained, 0

    def written(fd: int, view: memoryview) -> None:
        nonlocal count
        count += 1
        if first <= count - 1 < last:
            write(fd, view[: len(view) // 2])
            raise FULL
        write(fd, view)

    def saved(self: Policy, *arguments: Any, **named: Any) -> None:
        if rng.random() < 0.3:
            raise rng.choice((FULL, Exception("No space left on device (os error 28)")))
        save(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_write_all", written)
        patch.setattr(Policy, "save_pretrained", saved)
        yield


# ---- hostile model folders


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**7, 10**18, 0.5, 1e300, "", "x", "../x", "[" * 50, [], [0], [[[]]], {},
    "{{ 9 ** (9 ** 9) }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "(a+)+$",
)  # fmt: skip


@few_or(500)
def test_hostile_model_folders(
    num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    watched.setattr("strop.data.sandbox.SECONDS", 1.0)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    seen: Counter[str] = Counter()
    for seed in range(num):
        rng = random.Random(seed)
        model = tmp_path / str(seed)
        shutil.copytree(runs.files["model"], model)
        file = model / rng.choice([name for name in names if (model / name).exists()])
        if file.suffix == ".json" and rng.random() < 0.8:
            content = json.loads(file.read_text())
            for _ in range(rng.choice((1, 1, 2))):
                mutate(content, rng)
            file.write_text(json.dumps(content))
        else:
            damage(file, rng)
        keys = {"models.0.huggingface_id": str(model), "dataset.render": rng.choice(("auto", "chat"))}
        config = runs.config({**keys, "training.max_steps": 1})
        took = outcome(lambda config=config: strop.train(config))
        seen[took] += 1
        shutil.rmtree(model)
        shutil.rmtree(config.training.output_dir, ignore_errors=True)
    record_property("attack", f"hostile model folders: {num}, {dict(seen)}")


def mutate(value: Any, rng: random.Random) -> None:
    """Another value somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        value[key] = rng.choice(VALUES)
        return
