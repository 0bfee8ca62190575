"""How fast this processor multiplies matrices, measured, and the way it therefore takes. Floor 2.

Names of instructions do not tell: bfloat16 may be emulated, or have instructions that are slower than float32's (a Xeon
with AVX512-BF16 and without AMX: 160 GFLOP/s, and 260 to 300 in float32), and float32 may be faster by MKL or by
oneDNN. So each way is timed, once for every processor and release of torch, and the rates are kept in the cache: all
processes of a computer decide alike. One thread is timed, by the seconds that it computes, so that other work on the
computer does not decide.

Ways, by dtype and kind of product ("linear": a large one; "batched": many small ones, as in attention):

    own       as torch does it
    onednn    by oneDNN, of large float32 products, which torch gives to MKL where it has that
    widened   16 bits: the factors are made float32, which rounds nothing, and the result is rounded once
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop import machine
from strop.allocator import keep_few_kernels
from strop.cachedir import cache_folder
from strop.durable import hidden_name, remove, write_file
from strop.readable import short_name

logger = logging.getLogger("strop")

Rates = Mapping[str, Mapping[str, float]]
"""FLOP per second, by kind of product and way. Of 16 bits, "float32" is a kind too: large products of float32 factors,
measured between the others."""

MARGIN = 1.05
"""How many times as fast as torch's own way another must be to be taken: more than two measurements differ by."""
GAIN = 1.1
"""How many times as fast as float32 bfloat16 must be for `auto_precision` to choose it."""
ROWS, WIDTH = 512, 768
"""Of the factors of a large product."""
BATCH = (8, 256, 64, 512)
"""Products, rows, inner and columns of many small ones."""
ROUNDS = 5
"""Each way is timed so often, all in turn, and its fastest call counts. They take some 0.1 s together."""
HOPELESS = 5.0
"""A way whose first call takes this many times as long as the fastest is not called again (float16 where it is emulated
takes a hundred times)."""
FORMAT = 1

_taken: dict[tuple[torch.dtype, str], str] = {}


def way(dtype: torch.dtype, kind: str = "linear") -> str:
    """The way that products of `dtype` take on this computer's processor."""
    if dtype == torch.float64:
        return "own"
    if (taken := _taken.get((dtype, kind))) is not None:
        return taken
    rates = measured(dtype).get(kind, {})
    best = max(rates, key=lambda name: rates[name], default="own")
    return best if best != "own" and rates[best] >= MARGIN * rates["own"] else "own"


def ways(dtype: torch.dtype) -> dict[str, str]:
    """The ways of a run that computes in `dtype`, by name: {"float32 linear": "onednn", ...}."""
    dtypes = dict.fromkeys((torch.float32, dtype))
    return {f"{short_name(of)} {kind}": way(of, kind) for of in dtypes for kind in ("linear", "batched")}


@contextmanager
def taking(chosen: Mapping[str, str]) -> Iterator[None]:
    """Inside, products take these ways, named as `ways` does, whatever is measured: those of a run stay what they
    are."""
    global _taken
    torch.set_num_threads(torch.get_num_threads())  # MKL's threads are set by measuring, so in every process
    before, _taken = _taken, {_parsed(name): value for name, value in chosen.items()}
    try:
        yield
    finally:
        _taken = before


def record() -> dict[str, Any] | None:
    """The ways that are taken, as a checkpoint keeps them; None outside `taking`."""
    chosen = {f"{short_name(dtype)} {kind}": value for (dtype, kind), value in _taken.items()}
    return {"measured_on": measured_on(), "ways": chosen} if chosen else None


def ways_of_run(dtype: torch.dtype, recorded: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The ways of a run that computes in `dtype`. recorded: `record` of the run that it continues, whose ways it
    keeps on such a processor, so that it ends as an unbroken run does."""
    found = ways(dtype)
    if recorded is None:
        return found
    kept = {**found, **recorded["ways"]}
    if recorded["measured_on"] == measured_on():
        return kept
    if changed := sorted(name for name in found if found[name] != kept[name]):
        logger.warning(
            "this processor or release of torch makes products in other ways than the one that the run began on (%s), "
            "so the last digits of results differ",
            ", ".join(f"{name}: {kept[name]} then, {found[name]} now" for name in changed),
        )
    return found


def bf16_gains() -> bool:
    """Whether products in bfloat16, the faster way, are faster here than in float32."""
    return bf16_gain() >= GAIN


def bf16_gain() -> float:
    """The rate of large products in bfloat16, the faster way, by that of float32."""
    rates = measured(torch.bfloat16)
    return max(rates["linear"].values()) / rates["float32"]["own"]


def measured(dtype: torch.dtype) -> Rates:
    """The rates of this processor. Tests put others in their place."""
    return _known(dtype, measured_on())


def measured_on() -> str:
    """A name for all that rates depend on."""
    facts = [FORMAT, machine.processor().name, torch.__version__]
    return blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


@cache
def _known(dtype: torch.dtype, on: str) -> Rates:
    file = cache_folder("rates") / f"{short_name(dtype)}-{on}.json"
    return _read(file, dtype) or _kept(file, dtype, measure(dtype))


def _read(file: Path, dtype: torch.dtype) -> Rates | None:
    """What is kept there; None where there is nothing, or something else than such a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        shape = {kind: set(rates) for kind, rates in found.items()}
        fine = all(math.isfinite(rate) and rate > 0 for rates in found.values() for rate in rates.values())
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return found if fine and shape == {kind: set(works) for kind, works in _works(dtype).items()} else None


def _kept(file: Path, dtype: torch.dtype, rates: Rates) -> Rates:
    """`rates`, kept for other processes; or what another process kept first."""
    own = file.with_name(hidden_name("tmp", file.name))
    try:
        write_file(own, json.dumps(rates).encode())
        try:
            os.link(own, file)
        except FileExistsError:
            if (first := _read(file, dtype)) is not None:
                return first
            os.replace(own, file)
        finally:
            remove(own)
    except OSError as error:  # a full disk, a file system without links: measured again by the next process
        logger.debug("the rates of products are not kept: %s", error)
    return rates


def measure(dtype: torch.dtype) -> Rates:
    """Times every way of multiplying in `dtype` on one thread."""
    keep_few_kernels()
    works = {(kind, name): work for kind, ways in _works(dtype).items() for name, work in ways.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {key: [_seconds(work)] for key, (work, _) in works.items()}  # the first call makes kernels
        for _ in range(ROUNDS):
            for key, (work, _) in works.items():
                least = min(min(calls) for (kind, _), calls in seconds.items() if kind == key[0])
                if seconds[key][0] < HOPELESS * least:
                    seconds[key].append(_seconds(work))
    finally:
        torch.set_num_threads(num_threads)
    found: dict[str, dict[str, float]] = {}
    for (kind, name), calls in seconds.items():
        found.setdefault(kind, {})[name] = works[kind, name][1] / min(calls)
    logger.debug("products of %s, FLOP per second of one thread: %s", short_name(dtype), found)
    return found


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.thread_time()
    work()
    return max(time.thread_time() - started, 1e-9)


def _works(dtype: torch.dtype) -> dict[str, dict[str, tuple[Callable[[], Tensor], float]]]:
    """What is timed of a dtype, by kind and way, with its FLOP."""
    x, w = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    num, rows, inner, columns = BATCH
    a, b = torch.ones(num, rows, inner, dtype=dtype), torch.ones(num, inner, columns, dtype=dtype)
    linear, batched = 2.0 * ROWS * WIDTH * WIDTH, 2.0 * num * rows * inner * columns
    if dtype == torch.float32:
        ways = {"own": (lambda: x @ w.t(), linear)}
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            ways["onednn"] = (lambda: by_onednn(x, w), linear)
        return {"linear": ways}
    wide_x, wide_w = x.float(), w.float()
    product = by_onednn if way(torch.float32) == "onednn" else lambda x, w: x @ w.t()
    return {
        "linear": {
            "own": (lambda: x @ w.t(), linear),
            "widened": (lambda: product(x.float(), w.float()).to(dtype), linear),
        },
        "batched": {
            "own": (lambda: a @ b, batched),
            "widened": (lambda: (a.float() @ b.float()).to(dtype), batched),
        },
        "float32": {"own": (lambda: product(wide_x, wide_w), linear)},
    }


def by_onednn(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias by oneDNN: [T, O] of x [T, I], w [O, I] and bias [O], without gaps."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return product


def _parsed(name: str) -> tuple[torch.dtype, str]:
    dtype, _, kind = name.partition(" ")
    return getattr(torch, dtype), kind
