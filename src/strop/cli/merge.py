"""`strop merge`: an adapter into its base, as one model. Floor 10."""

from __future__ import annotations

from pathlib import Path

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.export.folders import check_output
from strop.named_models import check_merges
from strop.terminal import log_to_terminal, show

HELP = """\
usage: strop merge RUN|ADAPTER --output-dir DIR [options]

  RUN|ADAPTER        a run folder, or an adapter as peft saves it
  --output-dir DIR   gets the merged model; must be empty, or not there yet
  --base MODEL       the adapter's base, a folder or hub id (default: what adapter_config.json names)
  --dtype NAME       float32, bfloat16 or float16: of the merged weights (default: as in the base's files)
  --proof            write the comparison into DIR, as merge-proof.md

The merged model is loaded again and compared with the model that has the adapter beside it: every layer, the logits and
the greedy texts of twenty prompts. Where they differ by more than rounding explains, no model is written.
"""
DTYPES = ("float32", "bfloat16", "float16")


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("merge")
    parser.add_argument("source", nargs="?")
    parser.once("--output-dir")
    parser.once("--base")
    parser.once("--dtype", choices=DTYPES)
    parser.switch("--proof")
    options = parser.parse_args(arguments)
    if not options.source:
        raise ConfigError("no run and no adapter is given", fix="strop merge outputs/NAME --output-dir DIR")
    if not options.output_dir:
        raise ConfigError("--output-dir is missing", fix="see strop merge --help")
    log_to_terminal("info")
    target = Path(options.output_dir).expanduser()
    check_merges(options.source, options.base)  # before imports that take seconds
    check_output(target, (options.source,))

    import torch

    from strop.export.merge import merge

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    proof = merge(options.source, target, base=options.base, dtype=dtype, proof=options.proof)
    show(f"{proof.table()}\n{target} is the merged model, and answers as the model with the adapter does\n")
    return 0
