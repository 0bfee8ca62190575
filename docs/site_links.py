"""A hook of mkdocs: files of the project that are no pages are named, not linked: the site has no copy of them."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:configs|benchmarks|examples|src|tests|[A-Z]+\.md)[^)#]*)(?:#[^)]*)?\)"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[words](../configs/x.yaml)` becomes `words (`configs/x.yaml`)`."""
    return OUTSIDE.sub(lambda m: f"`{m[2]}`" if m[1].strip("`") in m[2] else f"{m[1]} (`{m[2]}`)", markdown)
