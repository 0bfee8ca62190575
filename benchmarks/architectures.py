"""Every causal architecture of the installed transformers, trained on a tiny model: what is right, what is refused.

    python -m benchmarks.architectures [--kinds llama gemma3] [--write docs/models.md]
    python -m benchmarks.architectures --experts [--kinds qwen3_moe] [--write docs/models.md]

Of each: load, dry run, SFT and DPO of two steps, LoRA and all weights; the result loaded again by plain transformers or
peft, with the same log-probs; a run that is resumed after its first step, with the same weights. Each has a process of
its own and a time limit. A refusal is an error of strop's with a reason; anything else is a fault.

`--experts` trains nothing: it writes the table of fused experts, from outlines of the models at the sizes that their
configuration classes have by default.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .tiny import NOT_ALONE, tiny_config, write_model

SECONDS = 600
"""Of one architecture, at most: the slowest took 117 on an idle processor's lowest priority, and one over 240 on a busy
one."""
BYTES = 8 * 2**30
RUNS = (("sft", False, True), ("dpo", True, True), ("sft", True, False), ("dpo", False, False))
"""Method; LoRA or all weights; whether the run is resumed after its first step and compared."""
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

EXPERTS_BEGIN, EXPERTS_END = "<!-- experts: begin -->", "<!-- experts: end -->"


@dataclass(frozen=True)
class Experts:
    """The fused experts of one architecture. names: as `lora.target_parameters` takes them. auto, all_linear, experts:
    percent of the weights of linear layers and experts that `auto`, `all-linear` and these names reach."""

    kind: str
    names: Sequence[str]
    auto: float
    all_linear: float
    experts: float


@dataclass(frozen=True)
class Found:
    """What became of one architecture. result: shared or plain (its rows), refused, fault, or not built. reason: why it
    is not shared. adapted: last parts of the names of the layers that `auto` adapts."""

    kind: str
    result: str
    reason: str = ""
    adapted: str = ""
    seconds: float = 0.0


@dataclass
class Watched:
    """What the policy of a run was when its result was written: log-probs of one row, and why its rows are plain."""

    logps: Any = None
    reason: str = ""
    adapted: str = ""


def check(kind: str, folder: Path) -> Found:
    """Train one architecture in every way, in `folder`."""
    from strop.errors import StropError

    os.environ["STROP_CACHE"] = str(folder / "cache")
    try:
        write_model(kind, folder / "model")
    except Exception as error:  # noqa: BLE001 (code of any architecture)
        why = NOT_ALONE.get(kind) or f"{type(error).__name__}: {_line(error)}"
        return Found(kind, "not built", why)
    _write_rows(folder)
    step = ""
    try:
        _dry_run(folder)
        seen = []
        for method, lora, resumed in RUNS:
            step = f"{method}, {'LoRA' if lora else 'all weights'}: "
            seen.append(_train(folder, method, lora, resumed))
    except StropError as error:
        return Found(kind, "refused", f"{step}{error.found}")
    except AssertionError as error:
        return Found(kind, "fault", f"{step}{_line(error)}")
    except Exception as error:  # noqa: BLE001 (what is looked for)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Found(kind, "fault", f"{step}{type(error).__name__}: {_line(error)} ({Path(last.filename).name})")
    reason = next((w.reason for w in seen if w.reason), "")
    return Found(kind, "plain" if reason else "shared", reason, next(w.adapted for w in seen if w.adapted))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _write_rows(folder: Path) -> None:
    from strop.demo.task import ITEMS

    pairs, single = [], []
    for i in range(6):
        prompt = [{"role": "user", "content": f"Sort: {ITEMS[i]} {ITEMS[i + 2]} {ITEMS[i + 1]}"}]
        answers = [[{"role": "assistant", "content": f"{ITEMS[i + n]} {ITEMS[i + 1]}"}] for n in range(2)]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        single.append({"prompt": prompt, "completion": answers[0]})
    for name, rows in (("dpo", pairs), ("sft", single)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _config(folder: Path, method: str, lora: bool) -> Any:
    import strop

    keys: dict[str, Any] = {
        "models.0.name": f"{method}-{'lora' if lora else 'full'}",
        "models.0.huggingface_id": str(folder / "model"),
        "dataset.train_file": str(folder / f"{method}.jsonl"),
        "dataset.validation_split": 0.0,
        "post_training.method": method,
        "lora.enabled": lora,
        "training.output_dir": str(folder / "out"),
        "training.max_steps": 2,
        "training.save_steps": 1,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 2,
        "training.max_seq_length": 128,
        "training.max_prompt_length": 96,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 0,
        "logging.log_level": "error",
    }
    return strop.load_config(overrides=keys)


def _dry_run(folder: Path) -> None:
    from rich.console import Console

    from strop.dryrun import dry_run

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        dry_run(_config(folder, "dpo", True), console=Console(file=nowhere))


def _train(folder: Path, method: str, lora: bool, resumed: bool) -> Watched:
    """Train, load the result by plain transformers and peft, resume after the first step; what was seen."""
    import torch

    import strop

    config, watched = _config(folder, method, lora), Watched()
    run = folder / "out" / config.models[0].name
    with _watching(watched):
        strop.train(config)
    again = _plain_logps(run / "final", lora)
    apart = float((again - watched.logps).abs().max())
    assert apart < 1e-3 * max(1.0, float(again.abs().max())), f"loaded again, its log-probs are off by {apart:.2g}"
    if not resumed:
        return watched
    before = _weights(run / "final")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-2", ignore_errors=True)
    strop.train(config, resume="auto")
    after = _weights(run / "final")
    assert before.keys() == after.keys(), "a resumed run has other weights"
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not moved, f"a resumed run has other weights, such as {moved[0]}" if moved else ""
    return watched


@contextmanager
def _watching(watched: Watched) -> Iterator[None]:
    """Score a row when the final model is written, and keep why rows are plain."""
    from strop.policy import policy as policies

    save = policies.Policy.save_pretrained

    def saving(policy: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        with policy.scoring():
            policy._use_attention(policy.plain_attention)
            ids = torch.tensor([_ids()])
            logits = policy.model(input_ids=ids, use_cache=False).logits.float()
            logps = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        watched.logps = logps
        watched.reason = "" if policy.share_prefix else (policy.plain_reason or "?")
        names = {n.split(".lora_A")[0].rpartition(".")[2] for n in policy.trainable() if ".lora_A" in n}
        watched.adapted = ", ".join(sorted(names))
        save(policy, *args, **kwargs)

    policies.Policy.save_pretrained = saving  # type: ignore[method-assign]
    try:
        yield
    finally:
        policies.Policy.save_pretrained = save  # type: ignore[method-assign]


def _ids() -> list[int]:
    """The tokens that results are compared on."""
    return [2, *range(5, 25), 3, 9, 8, 7, 4]


def _plain_logps(final: Path, lora: bool) -> Any:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    made = (AutoPeftModelForCausalLM if lora else AutoModelForCausalLM).from_pretrained(final).eval()
    ids = torch.tensor([_ids()])
    with torch.no_grad():
        logits = made(input_ids=ids, use_cache=False).logits.float()
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])


def _weights(final: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(final.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- all of them ------------------------------------------------------------------------------------------------------


def causal_kinds() -> list[str]:
    """model_type of every causal language model of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def limited(kind: str, seconds: float = SECONDS) -> Found:
    """`check` in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("fork")  # what is imported here is imported there
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_child, args=(kind, Path(folder), theirs))
        process.start()
        theirs.close()
        try:
            found = Found(**ours.recv()) if ours.poll(seconds) else Found(kind, "fault", f"took over {seconds:g} s")
        except EOFError:
            found = Found(kind, "fault", "its process ended without a word, perhaps for lack of memory")
        if process.is_alive():
            process.kill()
        process.join()
    return replace(found, seconds=round(time.perf_counter() - started, 1))


def _child(kind: str, folder: Path, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    pipe.send(asdict(check(kind, folder)))


def table(found: Sequence[Found]) -> str:
    """The results as Markdown."""
    counts = Counter(row.result for row in found)
    lines = [
        f"{len(found)} architectures: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) + ".",
        "",
        "| model_type | rows | why not shared, or why refused | `auto` adapts |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.kind} | {row.result} | {_cell(row)} | {row.adapted} |" for row in found]
    return "\n".join(lines)


def _cell(row: Found) -> str:
    untested = f"sharing is not tested with the architecture {row.kind}"
    return "" if row.reason == untested else row.reason.replace("|", "\\|")


def write_table(page: Path, found: Sequence[Found]) -> None:
    """Put the table between the marks of a page."""
    _write_between(page, BEGIN, table(found), END)


def _write_between(page: Path, begin: str, text: str, end: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


# --- fused experts ----------------------------------------------------------------------------------------------------


def experts_of(kind: str) -> Experts | None:
    """What adapters reach of an architecture with fused experts; None: it has none, or no outline of it can be made."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from strop.policy.model.adapter_targets import expert_parameters, resolve_targets, selected, sizes, text_layers

    try:
        with torch.device("meta"):
            if not expert_parameters(AutoModelForCausalLM.from_config(tiny_config(kind))):
                return None
            module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    except Exception:  # noqa: BLE001 (code of any architecture; the other table says why)
        return None
    weights, fused = sizes(module), expert_parameters(module)
    total = sum(weights.values()) / 100

    def share(names: Iterable[str]) -> float:
        return sum(weights[name] for name in names) / total

    layers = text_layers(module)
    auto, every = (share(selected(resolve_targets(module, how, kind), layers)) for how in ("auto", "all-linear"))
    names = {".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in fused}
    return Experts(kind, sorted(names), auto, every, share(fused))


def experts_table(found: Sequence[Experts]) -> str:
    """The same as Markdown."""
    lines = [
        "| model_type | `target_parameters` of its experts | `auto` reaches | `all-linear` reaches | the experts are |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {', '.join(row.names)} | {row.auto:.1f} % | {row.all_linear:.1f} % | {row.experts:.1f} % |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", help="these alone; default: all")
    parser.add_argument("--experts", action="store_true", help="the table of fused experts; nothing is trained")
    parser.add_argument("--results", type=Path, help="keep results in this file, and go on from it")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if asked.experts:
        rows = [row for kind in asked.kinds or causal_kinds() if (row := experts_of(kind)) is not None]
        print(experts_table(rows))
        if asked.write:
            _write_between(asked.write, EXPERTS_BEGIN, experts_table(rows), EXPERTS_END)
        return
    known: dict[str, Found] = {}
    if asked.results and asked.results.exists():
        lines = asked.results.read_text(encoding="utf-8").splitlines()
        known = {row["kind"]: Found(**row) for row in map(json.loads, lines)}
    import strop.dryrun
    import strop.training  # noqa: F401 (imported once, for all the processes)

    for kind in asked.kinds or causal_kinds():
        if kind in known and not asked.kinds:
            continue
        known[kind] = row = limited(kind)
        print(f"{row.kind:24} {row.result:9} {row.seconds:6.1f} s  {row.reason}", flush=True)
        if asked.results:
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    if asked.write:
        write_table(asked.write, [known[kind] for kind in sorted(known)])


if __name__ == "__main__":
    main()
