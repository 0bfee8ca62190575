"""What pages show: blocks, commands and commands within a sentence, in the order of the page; what stands in for the
names that a page uses, and what is shown but cannot be run by tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "llms.txt")),
    *sorted((ROOT / "configs").glob("*.yaml")),
    ROOT / "examples" / "gsm8k" / "gsm8k.yaml",
]
PROGRAMS = r"(?:strop|make|python3?|torchrun|pip|vllm|uv)"

NOT_RUN = {
    r"make \S+": "it sets up an environment first; the target is looked up in the Makefile",
    r"pip install .*": "it installs packages; an extra is looked up in pyproject.toml",
    r"(?:\w+=\w+ )?vllm serve .*": "vLLM is not among what the tests need; it needs a GPU",
    r"python (?:-m sglang\.|llama\.cpp/).*": "SGLang and llama.cpp are not among what the tests need",
    r"(?:llama-server|llama-quantize|ollama) .*": "llama.cpp and Ollama are not among what the tests need",
    r"strop eval .*--tasks arc_easy.*": "it loads questions from a hub; tests/smoke/test_tasks.py asks its own",
    r"torchrun .*": "it needs several machines, or starts processes, which tests/smoke/test_processes.py does; "
    "the command that it starts is run by a dry run",
    r"strop train .*--(?:device-ids|use-ddp|fsdp|num-processes) .*": "it needs several GPUs, or starts processes, as "
    "above; it is run by a dry run",
    r"strop demo": "it trains for minutes; tests/smoke/test_demo.py trains a small one",
    r"python (?:-m benchmarks\.|docs/|benchmarks/).*": "it measures for minutes; the file is looked for",
}
"""Commands that no test runs as they are shown, and why. A test sees to it that each entry is on a page."""

STAND_INS = (
    (r"--config (?:FILE|\$\S+)", "--config dpo.yaml"),
    (r"eval RUN (?=.*--method reward)", "eval outputs/reward/NAME "),
    (r"--data FILE --method distill", "--data data/splits/val.jsonl --method distill"),
    (r"--data FILE", "--data test.jsonl"),
    (r"--prompts FILE", "--prompts prompts.jsonl --max-new-tokens 8"),
    (r"\bimport FILE", "import their.yaml"),
    (r"\breport RUN RUN \.\.\.", "report outputs/NAME outputs/OTHER"),
    (r"\bcompare RUN RUN", "compare outputs/NAME outputs/OTHER"),
    (r"\bRUN\b", "outputs/NAME"),
    (r"--step (?:N|40)\b", "--step 1"),
    (r"NAME=VALUE", "drift_warn=0.5"),
    (r"methods NAME", "methods dpo"),
    (r"\bmodel \.\.\.|\bMODEL \.\.\.|\b(?:MODEL|TEACHER)\b", "model"),
    (r"convert DIR --to hf", "convert consolidated --to hf --output-dir again"),
)
"""What is put in place of words that a reader replaces."""
SMALL = "--max-steps 2 --max-seq-length 64 --max-prompt-length 32 --max-completion-length 32"


@dataclass(frozen=True)
class Block:
    """Something that a page shows. language: of a fenced block; `sh` also for a command within a sentence."""

    section: str
    language: str
    text: str
    in_sentence: bool = False


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(markdown: str) -> Iterator[Block]:
    """Fenced blocks, and commands between backticks, in the order of the page."""
    section = ""
    for match in re.finditer(
        rf"^```(?P<language>\w*)\n(?P<fenced>.*?)^```|^## (?P<section>[^\n]*)$|`(?P<inline>{PROGRAMS}\s[^`]+)`",
        markdown,
        flags=re.MULTILINE | re.DOTALL,
    ):
        if match["section"]:
            section = match["section"]
        elif match["inline"]:
            yield Block(section, "sh", " ".join(match["inline"].split()), in_sentence=True)
        else:
            yield Block(section, match["language"], match["fenced"])


def blocks_of(page: Path) -> list[Block]:
    """Of a configuration: the commands in its comments, each a section of its own."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        lines = re.findall(rf"^# {{2,}}({PROGRAMS} .*)$", text, flags=re.MULTILINE)
        return [Block(line, "sh", line) for line in lines]
    return list(blocks(text))


def commands(block: Block, languages: tuple[str, ...] = ("sh",)) -> Iterator[str]:
    """The command lines of a shell block, without comments."""
    if block.language not in languages:
        return
    for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
        command = re.sub(r"(?:^|\s+)#.*", "", line).strip()
        if command:
            yield command


def names_a_command(block: Block) -> bool:
    """Whether a sentence only says the name of a command, such as `strop import`."""
    return block.in_sentence and len(block.text.split()) == 2


def why_not(command: str) -> str | None:
    """The entry of NOT_RUN that a command falls under."""
    return next((pattern for pattern in NOT_RUN if re.fullmatch(pattern, command)), None)


def with_stand_ins(command: str) -> str:
    for pattern, stand_in in STAND_INS:
        command = re.sub(pattern, stand_in, command)
    return command


def is_configuration(yaml: str) -> bool:
    from strop.config.schema import SECTIONS

    return set(re.findall(r"^([a-z_]+):", yaml, flags=re.MULTILINE)) <= {*SECTIONS, *SECTIONS[""], "preset"}


def file_name(yaml: str) -> str | None:
    """The name of a file that stands in the first line of a block, as a comment."""
    found = re.match(r"# (\S+\.(?:yaml|py))\n", yaml)
    return found[1] if found else None
