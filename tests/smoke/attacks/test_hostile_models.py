"""Model folders, adapters, chat templates and tokenizers made by mutation: a result that is one, or one message."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import strop
from smoke.attacks.trials import Tally, damage, few_or, mutate, mutate_parts, outcome
from strop.prepared import Prepared

MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors",
)


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of foreign work, so low that reaching them takes no minutes."""
    monkeypatch.setattr("strop.data.text.sandbox.SECONDS", 0.5)
    monkeypatch.setattr("strop.data.text.sandbox.BYTES", 512 << 20)
    for place in (
        "strop.time_limit.SECONDS",
        "strop.data.store.worker_pool.SECONDS",
        "strop.policy.model.adapter_settings.PATTERN_SECONDS",
    ):
        monkeypatch.setattr(place, 2.0)


def changed_json(file: Path, rng: random.Random, changes: Callable[[Any, random.Random], None] = mutate) -> str:
    """Damage to the bytes of a JSON file, or other values in it."""
    if rng.random() < 0.15:
        return damage(file, rng)
    content = json.loads(file.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 2, 3))):
        changes(content, rng)
    file.write_text(json.dumps(content), encoding="utf-8")
    return "mutate"


def changed_tensors(file: Path, rng: random.Random) -> str:
    """Damage to the bytes of a file of weights, or other tensors in it."""
    if rng.random() < 0.3:
        return damage(file, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    how = rng.choice(("drop", "rename", "add", "cut", "cast", "nan", "huge", "empty", "scalar"))
    match how:
        case "drop":
            del tensors[name]
        case "rename":
            tensors[name + rng.choice(("x", ".weight", "/../../x", ""))] = tensors.pop(name)
        case "add":
            tensors["model.layers.99.self_attn.q_proj.weight"] = torch.zeros(2, 2)
        case "cut":
            tensors[name] = tensors[name][: max(1, len(tensors[name]) // 2)].contiguous()
        case "cast":
            tensors[name] = tensors[name].to(rng.choice((torch.float16, torch.int8, torch.bool, torch.float64)))
        case "nan":
            tensors[name].view(-1)[0] = rng.choice((float("nan"), float("inf")))
        case "huge":
            tensors[name] *= 1e30
        case "empty":
            tensors[name] = tensors[name][:0].contiguous()
        case _:
            tensors[name] = torch.tensor(1.0)
    save_file(tensors, file, {"format": "pt"})
    return how


def finite(tensors: dict[str, torch.Tensor]) -> bool:
    return bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@few_or(500, few=5)
def test_hostile_model_folders(
    num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    tally = Tally("hostile model folders", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        with copied(runs.files["model"], tmp_path / str(seed)) as model:
            file = model / rng.choice([name for name in MODEL_FILES if (model / name).exists()])
            how = {".json": changed_json, ".safetensors": changed_tensors}.get(file.suffix, damage)
            how(file, rng)
            keys = {"models.0.huggingface_id": str(model), "dataset.render": rng.choice(("auto", "chat"))}
            config = runs.config({**keys, "training.max_steps": 1})
            took = outcome(partial(strop.train, config))
            if took == "done":
                assert finite(runs.at(Path(config.training.output_dir) / "run").final), seed
            tally.add(took)
        shutil.rmtree(config.training.output_dir, ignore_errors=True)
    tally.tell(num)


@few_or(200, few=5)
def test_hostile_adapters(
    num: int, record_property: Any, runs: Any, tmp_path: Path, watched: pytest.MonkeyPatch
) -> None:
    plain, rich = ({"lora.r": 4}, {"lora.r": 4, "lora.use_dora": True, "lora.target_modules": "all-linear"})
    adapters = [runs({**keys, "training.max_steps": 1}).path / "final" for keys in (plain, rich)]
    tally = Tally("hostile adapters", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        with copied(rng.choice(adapters), tmp_path / str(seed)) as adapter:
            if rng.random() < 0.8:  # else the manifest tells
                (adapter / "MANIFEST.json").unlink(missing_ok=True)
            if rng.random() < 0.6:
                changed_json(adapter / "adapter_config.json", rng, mutate_adapter)
            else:
                changed_tensors(adapter / "adapter_model.safetensors", rng)
            config = runs.config({"models.0.adapter": str(adapter), "training.max_steps": 1})
            took = outcome(partial(strop.train, config))
            if took == "done":
                assert finite(runs.at(Path(config.training.output_dir) / "run").final), seed
            tally.add(took)
        shutil.rmtree(config.training.output_dir, ignore_errors=True)
    tally.tell(num)


def mutate_adapter(content: Any, rng: random.Random) -> None:
    """What adapters of their own making hold, besides values that fit nowhere."""
    chosen: tuple[tuple[str, Any], ...] = (
        ("target_modules", "(a|aa)+$"), ("target_modules", ["(.*.*)*x"]), ("target_modules", "all-linear"),
        ("target_modules", ["lm_head"]), ("target_modules", ["embed_tokens"]), ("target_modules", ["nothing"]),
        ("rank_pattern", {"(.+)+q_proj$": 2}), ("rank_pattern", {"q_proj": 3}), ("alpha_pattern", {"q_proj": 1e30}),
        ("layers_to_transform", [0]), ("layers_pattern", "(x+x+)+y"), ("modules_to_save", ["lm_head"]),
        ("exclude_modules", "(.*)*z"), ("r", 8), ("r", 0), ("r", -1), ("lora_alpha", 0), ("lora_alpha", 1e300),
        ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("fan_in_fan_out", True), ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"), ("auto_mapping", {"base_model_class": "os", "parent_library": "os"}),
        ("base_model_name_or_path", "../../x"), ("target_parameters", ["mlp.gate_proj.weight"]),
        ("lora_bias", True), ("megatron_config", {}), ("loftq_config", {"loftq_bits": 4}), ("revision", "x" * 5000),
    )  # fmt: skip
    if rng.random() < 0.5:
        mutate(content, rng)
    else:
        key, value = rng.choice(chosen)
        content[key] = value


# ---- what renders and tokenises, up to the weights


CONVERSATIONS = [
    [("user", "which animal jumps?"), ("assistant", f"the quick brown fox {i}")]
    if i % 2
    else [("system", "be brief"), ("user", f"hello {i}"), ("assistant", "yes"), ("user", "over?"), ("assistant", "no")]
    for i in range(8)
]

TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:]"
    " %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}{{ 'User: ' }}"
    "{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}{{ (m['content'] | trim) + '\n' }}{% else %}"
    "{{ 'Assistant: ' + (m['content'] | trim) + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
)
"""Of ChatML, with generation blocks, and one that moves the system turn."""

TAGS, WORDS = re.compile("({.+?[%}]})", re.DOTALL), re.compile(r"(\w+)")
"""What a template is taken apart into: its tags, or anything."""

PIECES = (
    "{{ 9 ** (9 ** 9) }}", "{{ 'a' * 10 ** 10 }}", "{{ 'x'.center(10 ** 10) }}", "{{ range(10 ** 9) | list }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ messages | string * 10**8 }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ lipsum() }}", "{{ raise_exception('no') }}",
    "{% include 'x' %}", "{% import 'os' as os %}", "{% set messages = [] %}", "{{ m['content'] | upper }}", "\0",
    "{{ m.content | urlize }}", "{{ m.content | wordwrap(1) }}", "{{ strftime_now('%Y') }}", "{% generation %}", "{{",
    "{% endgeneration %}", "{% if false %}", "{% endif %}", "}}", "{#", "{{ '%1000000000d' % 1 }}", "<|im_end|>",
    "{{ '{:>1000000000}'.format(1) }}", "{{ [1] | batch(0) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[99].content }}", "{{ tools }}", "{{ m | tojson(indent=10**9) }}", "{{ eos_token * 1000 }}", "%}",
    "{{ messages.append(1) }}", "{% call f() %}", "{{ [1, 2, 3] | random }}", "{{ range(9) | random }}", "\U000f0000",
    "{{ m['content'] | replace('o', '') }}", "{{ m['content'] }}", "{% break %}", "{{ loop(1) }}", "{{ undefined.x }}",
    "{% filter upper %}", "{% endfilter %}", "{{ m['content'][::-1] }}", "{% set m = messages[0] %}", "<|im_start|>",
)  # fmt: skip


@few_or(200, few=10)
def test_hostile_templates(
    num: int, record_property: Any, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tally = conversations(tmp_path), Tally("hostile templates", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        parts: list[str] = (TAGS if rng.random() < 0.8 else WORDS).split(rng.choice(TEMPLATES))
        for _ in range(rng.choice((1, 1, 2, 4))):
            parts = mutate_parts(parts, PIECES, rng) or [""]
        template = "".join(parts)
        with copied(runs.files["model"], tmp_path / str(seed)) as model:
            if rng.random() < 0.3:
                settings = json.loads((model / "tokenizer_config.json").read_text())
                named = [{"name": name, "template": template} for name in ("default", "tool_use")]
                settings["chat_template"] = rng.choice((template, named))
                (model / "tokenizer_config.json").write_text(json.dumps(settings))
                (model / "chat_template.jinja").unlink()
            else:
                (model / "chat_template.jinja").write_text(template)
            prepared, took = prepares(runs, model, file, tmp_path)
            if prepared is not None:
                check_answers(prepared, seed)
            tally.add(took)
    tally.tell(num)


def check_answers(prepared: Prepared, seed: int) -> None:
    """Every answer that is kept is trained as it stands in its row, and nothing of the other turns is."""
    for group in prepared.data.train:
        ids = [i for c in group.completions for i, on in zip(c.ids, c.loss_mask, strict=True) if on]
        trained = prepared.tokenizer.decode(ids)
        turns = CONVERSATIONS[group.origin.line - 1]
        assert turns[-1][1] in trained, (seed, trained)
        assert not any(words in trained for role, words in turns if role != "assistant"), (seed, trained)


TOKENIZER_PARTS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        {"type": "Replace", "pattern": {"Regex": "(e|ee)+$"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": "(.*.*)*x"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100_000},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
        {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Lowercase"},
        {"type": "NFKC"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "eee"}] * 20},
    ),
    "pre_tokenizer": (
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        None,
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
         "special_tokens": {"x": {"id": "x", "ids": [99999], "tokens": ["x"]}}},
        {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 10**6]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ),
    "decoder": ({"type": "WordPiece", "prefix": "##", "cleanup": True}, None),
    "truncation": ({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},),
    "padding": (
        {"strategy": {"Fixed": 10**7}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "<|pad|>"},
    ),
    "added_tokens": tuple(
        [{"id": number, "content": text, "single_word": False, "lstrip": strips, "rstrip": strips, "normalized": strips,
          "special": special}]
        for number, text, strips, special in (
            (10**9, "e", False, True), (0, "", False, True), (400, " ", True, False), (3, "the", True, True),
            (-1, "x", False, False), (2, "<|im_end|>", True, True), (5, "<|im_start|>", False, False),
        )
    ),
}  # fmt: skip
"""Parts of a tokenizer.json that take for ever, grow, fail, or give ids that no model has."""


@few_or(200, few=10)
def test_hostile_tokenizers(
    num: int, record_property: Any, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tally = conversations(tmp_path), Tally("hostile tokenizers", record_property)
    for seed in range(num):
        rng = random.Random(seed)
        with copied(runs.files["model"], tmp_path / str(seed)) as model:
            name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
            how = mutate_tokenizer if name == "tokenizer.json" else mutate
            changed_json(model / name, rng, how)
            prepared, took = prepares(runs, model, file, tmp_path)
            if prepared is not None:
                check_ids(prepared, seed)
                again, _ = prepares(runs, model, file, tmp_path)
                assert again is not None, seed
                assert again.data.report.fingerprint == prepared.data.report.fingerprint, seed
            tally.add(took)
    tally.tell(num)


def mutate_tokenizer(content: Any, rng: random.Random) -> None:
    if rng.random() < 0.4:
        mutate(content, rng)
        return
    part = rng.choice((*TOKENIZER_PARTS, "model"))
    if part == "model":
        key, value = rng.choice(
            (("dropout", 0.5), ("unk_token", "x"), ("fuse_unk", True), ("byte_fallback", True), ("type", "WordPiece"),
             ("ignore_merges", True), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"))
        )  # fmt: skip
        content["model"][key] = value
    elif part == "added_tokens":
        content[part] = content[part] + rng.choice(TOKENIZER_PARTS[part])
    else:
        content[part] = rng.choice(TOKENIZER_PARTS[part])


def check_ids(prepared: Prepared, seed: int) -> None:
    """The model has a vector for every token, and something of every row is trained."""
    for group in prepared.data.train:
        for completion in group.completions:
            assert any(completion.loss_mask), seed
            assert all(0 <= i < 400 for i in (*group.prompt_ids, *completion.ids)), seed


def conversations(folder: Path) -> Path:
    file = folder / "conversations.jsonl"
    rows = [[{"role": role, "content": words} for role, words in turns] for turns in CONVERSATIONS]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@contextmanager
def copied(source: Path, target: Path) -> Iterator[Path]:
    shutil.copytree(source, target)
    try:
        yield target
    finally:
        shutil.rmtree(target)


def prepares(runs: Any, model: Path, file: Path, folder: Path) -> tuple[Prepared | None, str]:
    """The road up to the weights, and how it ended."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    keys = {
        "models.0.huggingface_id": str(model),
        "dataset.train_file": str(file),
        "dataset.validation_split": 0.0,
        "dataset.on_error": "skip",
        "post_training.method": "sft",
        "training.max_seq_length": 100_000,
        "training.max_prompt_length": None,
    }
    found: list[Prepared] = []
    took = outcome(lambda: found.append(runs.prepare(keys)))
    return (found[0] if found else None), took
