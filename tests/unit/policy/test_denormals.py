"""Denormal numbers are taken for 0 in every thread that computes, also in those that ran before."""

import io
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from processes import apart

COUNT = """
import torch

torch.set_num_threads(2)
small, smaller = torch.full((600, 1), 1e-30), torch.full((600, 1), 1e-10)

def denormal() -> int:
    "How many numbers are denormal, of products by both libraries and of what is computed element by element."
    found = [
        small @ smaller.t(),
        torch.ops.mkldnn._linear_pointwise(small, smaller, None, "none", [], ""),
        torch.full((1000, 1000), 1e-39) * 0.5,
    ]
    numbers = [t.view(torch.int32) & 0x7FFFFFFF for t in found]  # compared as integers, which nothing flushes
    return sum(int(((n > 0) & (n < 0x00800000)).sum()) for n in numbers)
"""
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def run(code: str) -> str:
    """What is printed last in a process that has computed nothing yet, in which nothing is switched."""
    return apart(_printed, COUNT + textwrap.dedent(code)).strip().splitlines()[-1]


def _printed(code: str) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _can_flush() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")


@pytest.mark.share(1)
@onednn
@pytest.mark.parametrize("before", ["", "denormal()"], ids=["no thread runs yet", "threads run already"])
def test_every_thread_flushes(before: str) -> None:
    asked = "from strop.policy.kernels.denormals import flush_denormals\nflush_denormals()\nprint(denormal())"
    assert run(f"{before}\n{asked}") == "0"


@onednn
def test_the_count_sees_threads_that_do_not() -> None:
    """Switched in this thread alone, those that ran before go on as they were."""
    assert int(run("denormal()\ntorch.set_flush_denormal(True)\nprint(denormal())")) > 100_000


@pytest.mark.nightly
@onednn
def test_a_run_from_python_flushes(model_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "chosen": "world", "rejected": "yes"}\n' * 2)
    out = run(
        f"""
        import strop
        denormal()
        strop.train(strop.load_config(overrides={{
            "models": [{{"name": "m", "huggingface_id": {str(model_dir)!r}}}],
            "dataset": {{"train_file": {str(rows)!r}, "validation_split": 0.0}},
            "post_training": {{"method": "dpo"}},
            "training": {{"output_dir": {str(tmp_path / "out")!r}, "max_steps": 1}},
        }}))
        print(denormal())
        """
    )
    assert out == "0"


def test_the_suite_runs_under_it() -> None:
    """What tests compare, with TRL and between cuts of a step, is compared with denormals flushed."""
    assert not bool((torch.full((4,), 1e-39) * 0.5).view(torch.int32).any())
