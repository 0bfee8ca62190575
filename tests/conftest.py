"""Fixtures of the whole suite: a tiny model and tokenizer made in code, the shared data where it stands, and the
processor that tests see, which is the same on every computer (`--pretend`)."""

from __future__ import annotations

import gc
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretend import EMULATES, not_synced, surroundings
from strop import machine
from strop.policy.kernels import product_rates
from strop.policy.kernels.denormals import flush_denormals

REAL_FSYNC = os.fsync

# a busy machine is no failure; `make nightly` draws three times as many examples
hypothesis.settings.register_profile("strop", deadline=None, max_examples=40)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=120)
hypothesis.settings.load_profile("strop")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "user assistant system question answer yes no maybe hello world",
    "1 2 3 4 5 6 7 8 9 0 + - = ? ! . , ; : \n\n",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pretend", default="plain", help="the surroundings that tests see, by the names of tests/pretend.py"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.share(n)`: of the cases of this test, n are in the suite, and all in `make nightly`. Which ones is
    decided by their names alone, so that a new case moves no more than one other out."""
    cases: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        share = item.get_closest_marker("share")
        if share is not None and item.get_closest_marker("nightly") is None:
            cases.setdefault((item.nodeid.partition("[")[0], share.args[0]), []).append(item)
    for (_, count), same_test in cases.items():
        for item in sorted(same_test, key=lambda item: zlib.crc32(item.name.encode()))[count:]:
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(scope="session", autouse=True)
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """The processor and the number of threads do not depend on the computer that tests run on, in processes that they
    start neither."""
    name = request.config.getoption("--pretend")
    chosen = surroundings(name)
    torch.set_num_threads(chosen.threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STROP_TESTS_PRETEND", name)
        patch.setenv("STROP_TESTS_SYNC", str(int(chosen.syncs)))
        if not chosen.syncs:
            patch.setattr(os, "fsync", not_synced)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "inherited"), prepend=os.pathsep)
        if chosen.processor is not None:
            patch.setattr(machine, "processor", lambda: chosen.processor)
        if chosen.multiplies is not None:
            patch.setattr(product_rates, "measured", chosen.multiplies.rates)
        yield


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced, as in every run of a user."""
    monkeypatch.setattr(os, "fsync", REAL_FSYNC)
    monkeypatch.setenv("STROP_TESTS_SYNC", "1")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the processor multiply as fast as is said: `pretend(bf16=2.0)` (`pretend.Multiplies`), the rest as `plain`
    does."""

    def put(**changes: float) -> None:
        monkeypatch.setattr(product_rates, "measured", replace(EMULATES, **changes).rates)

    return put


@pytest.fixture(scope="session", autouse=True)
def _no_denormals() -> None:
    """As in every run on a CPU, so that what tests compare is compared under it."""
    flush_denormals()


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """What imports have made stays. So `gc.collect()`, by which commands let models go, does not look through it: that
    would take half a second each time in a process that has imported all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """What a shell starts in the background inherits ignored interrupts, which some tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens of tests are not kept."""
    os.environ["STROP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, tokenizers and a base model, beside the project."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder, which is not at {folder}")
    return folder


def build_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


TINY: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # so that predictions differ from token to token
}
"""Sizes of a decoder of any family with the vocabulary of `build_tokenizer`."""
WITH_ENDS: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
"""The same with the special tokens of `build_tokenizer`."""


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    """A Llama of some 40 thousand weights with the vocabulary of `build_tokenizer`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**WITH_ENDS, **changes})).to(dtype)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with the tiny model and tokenizer, as `from_pretrained` wants it."""
    folder = tmp_path / "tiny-model"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    return build_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the attacks came to, by outcome."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    lines = [text for r in reports for name, text in getattr(r, "user_properties", ()) if name == "attack"]
    if lines:
        terminalreporter.section("attacks")
        for line in sorted(set(lines)):
            terminalreporter.line(line)
