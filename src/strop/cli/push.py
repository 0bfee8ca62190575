"""`strop push`: the finished model of a run to a hub. Floor 10."""

from __future__ import annotations

from strop.cli.parser import Parser
from strop.errors import ConfigError
from strop.terminal import log_to_terminal, show
from strop.uploads import bad_names, finished_model, no_hub

HELP = """\
usage: strop push RUN --repo OWNER/NAME [options]

  RUN                a run folder, or a folder with a model or an adapter
  --repo OWNER/NAME  the repository; made, as a private one, where it is not there
  --public           make it a public one
  --base OWNER/NAME  the id of an adapter's base, where the adapter was trained on a folder

Uploads final/ with its model card, in one commit, by the login of huggingface_hub (hf auth login, or HF_TOKEN).
"""


def usage() -> str:
    return HELP


def run(arguments: list[str]) -> int:
    parser = Parser("push")
    parser.add_argument("source", nargs="?")
    parser.once("--repo")
    parser.once("--base")
    parser.switch("--public")
    options = parser.parse_args(arguments)
    if not options.source:
        raise ConfigError("no run is given", fix="strop push outputs/NAME --repo OWNER/NAME")
    if not options.repo:
        raise ConfigError("--repo is missing", fix="strop push outputs/NAME --repo OWNER/NAME")
    log_to_terminal("info")
    finished_model(options.source)  # before imports that take seconds
    for problem in (*bad_names(options.repo, "--repo", "--repo OWNER/NAME"), *no_hub(f"--repo {options.repo}")):
        raise problem

    from strop.push import push

    show(f"{push(options.source, options.repo, private=not options.public, base=options.base)}\n")
    return 0
