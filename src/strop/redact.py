"""Keeps tokens and keys out of everything that is written down. Floor 0: stdlib only.

Two ways, together: what looks like a credential whatever stands around it, and what this process was handed as one in
its environment (HF_TOKEN, WANDB_API_KEY, ...), wherever the same characters turn up again. Every search takes time in
proportion to the text, which may be of hundreds of megabytes: lengths are bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache

MASK = "[redacted]"

_SHAPES = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,}                            # Hugging Face
    | \bapi_org_[A-Za-z0-9]{20,}                       # Hugging Face, organisations
    | \b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b          # AWS key ids
    | \b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{30,}       # GitHub
    | \bgithub_pat_[A-Za-z0-9_]{30,}
    | \bglpat-[A-Za-z0-9_-]{20,}                       # GitLab
    | \bsk-[A-Za-z0-9_-]{20,}                          # OpenAI and those who copy its form
    | \bwandb_v\d+_[A-Za-z0-9_]{20,}                   # Weights & Biases; the older form is 40 hex digits, see below
    | \blocal-[0-9a-f]{40}\b
    | \bxox[abpors]-[A-Za-z0-9-]{10,}                  # Slack
    | \beyJ[A-Za-z0-9_-]{6,}\.eyJ[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)+  # JSON web tokens
    | (?<=://)[^/\s:@]{0,200}:(?!\d{1,5}/)[^\s"'<>]{1,200}(?=@)  # user:password in a URL, up to the last @
    """,
    re.VERBOSE,
)
_KEY_BLOCK = re.compile(
    r"""
    -----BEGIN\ [A-Z0-9 ]{0,40}PRIVATE\ KEY(?:\ BLOCK)?-----
    (?:\\{1,8}[nrt]|[\w+/=\s:,.()-])*?                 # what a key is written with, line ends as escapes, too
    (?:-----END\ [A-Z0-9 ]{0,50}-----|(?=\\{1,8}[^nrt\\]|[^\w+/=\s:,.()\\-])|\Z)
    """,
    re.VERBOSE,
)
_NAMED = re.compile(
    r"""
    (?P<name>(?i:\b(?:[a-z0-9]{1,40}[_-]){0,4}(?:
        pass(?:word|wd) | pwd | (?P<words>passphrase) | secret(?:[_-]?key)? | client[_-]?secret
        | (?:api|access|account|shared[_-]?access|private)[_-]?key | (?:auth|access|refresh|bearer)[_-]?token)))
    (?P<between>\\{0,8}["']?\s?[=:]\s?)
    (?: (?P<quote>\\{0,8}["']).{4,400}?(?P=quote)                # to the same quote
      | (?(words)[^"'\\;\r\n<>{}]{4,200}                    # words, to the end of the line
        | [^\s"'\\;,&<>(){}\[\]]{4,400}))                   # one word
    """,
    re.VERBOSE,
)
"""A password under its name, as in a connection string (Server=...;Password=...;), a file of settings or JSON."""
_AWS_SECRET = re.compile(r"(?i)(aws_secret_access_key|aws_session_token)(\W{1,6})[A-Za-z0-9/+=]{30,}")
_SECRET_NAME = re.compile(r"(?i)(^|[_.-])(key|token|secret|password|passwd|pwd|credentials?|auth)$|apikey$|authtoken$")
_HEX_40 = re.compile(r"(?<![0-9A-Fa-f])[0-9a-f]{40}(?![0-9A-Fa-f])")
_MIN_SECRET = 12  # a shorter value of some ..._KEY variable may be an everyday word


def redact(text: str) -> str:
    """`text` with every credential replaced by a mask."""
    for secret in _handed_in() if len(text) >= _MIN_SECRET else ():
        text = text.replace(secret, MASK)
    text = _SHAPES.sub(MASK, _KEY_BLOCK.sub(MASK, text))
    return _NAMED.sub(_without_value, _AWS_SECRET.sub(rf"\1\2{MASK}", text))


def _without_value(match: re.Match[str]) -> str:
    quote = match["quote"] or ""
    return f"{match['name']}{match['between']}{quote}{MASK}{quote}"


@lru_cache(maxsize=1024)
def _names_secret(variable: str) -> bool:
    return _SECRET_NAME.search(variable) is not None


def _handed_in() -> list[str]:
    values = [os.environ.get(name, "") for name in os.environ if _names_secret(name)]
    found = {v.strip() for v in values if len(v.strip()) >= _MIN_SECRET and not os.path.exists(v)}
    return sorted(found, key=len, reverse=True)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its credentials: what follows `--...token`, `..._KEY=` and the like is masked too.

    40 hex digits are masked (a W&B key looks so) unless they are given as a revision, which looks the same.
    """
    shown: list[str] = []
    name = ""  # of the flag whose value comes next
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if equals and _SECRET_NAME.search(flag):
            shown.append(f"{flag}={MASK}")
            name = ""
            continue
        if name and not argument.startswith("-") and _SECRET_NAME.search(name):
            shown.append(MASK)
        else:
            shown.append(_mask_hex(argument, flag if equals else name))
        name = argument if argument.startswith("-") and not equals else ""
    return shown


def _mask_hex(argument: str, name: str) -> str:
    argument = redact(argument)
    return argument if name.rstrip("0123456789").endswith(("revision", "commit")) else _HEX_40.sub(MASK, argument)
