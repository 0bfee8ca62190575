"""`strop convert`: between transformers' folders and consolidated files. Floor 10."""

from __future__ import annotations

from pathlib import Path

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.export.folders import check_output
from strop.named_models import check_converts
from strop.terminal import log_to_terminal, show

HELP = """\
usage: strop convert SRC --to consolidated|hf --output-dir DIR

  SRC                to consolidated: a model folder, a run or a hub id; to hf: a folder with consolidated.NN.pth and
                     params.json
  --to LAYOUT        consolidated: consolidated.00.pth, params.json, tokenizer files
                     hf: safetensors, config.json, tokenizer files, as transformers loads them
  --output-dir DIR   gets them; must be empty, or not there yet

For Llama, Mistral, Qwen 2.5, Qwen 3 and OLMo 2. Nothing is computed: there and back is the same to the bit. A .pth that
holds anything but tensors is refused.
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("convert")
    parser.add_argument("source", nargs="?")
    parser.once("--to", choices=("consolidated", "hf"))
    parser.once("--output-dir")
    options = parser.parse_args(arguments)
    for name, value in (("SRC", options.source), ("--to", options.to), ("--output-dir", options.output_dir)):
        if not value:
            raise ConfigError(f"{name} is missing", fix="see strop convert --help")
    log_to_terminal("info")
    target = Path(options.output_dir).expanduser()
    check_converts(options.source, options.to)  # before imports that take seconds
    check_output(target, (options.source,))

    from strop.export.convert import to_consolidated, to_transformers

    convert = to_consolidated if options.to == "consolidated" else to_transformers
    convert(options.source, target)
    show(f"{target} is the converted model\n")
    return 0
