"""Text of foreign hand on its way to a page: nothing invisible, no credentials, not too long. Floor 2."""

from __future__ import annotations

import html

from strop.redact import redact

HIDDEN = {
    code: f"\\u{code:04x}"
    for stretch in (
        (0, 9),
        (11, 32),
        (0x7F, 0xA0),
        (0x200B, 0x2010),
        (0x2028, 0x202F),
        (0x2060, 0x206A),
        (0xD800, 0xE000),
    )
    for code in (*range(*stretch), 0x61C, 0xFEFF)
}
"""Characters that are not to be seen, and how they are written."""


def visible(text: object, most: int = 4000) -> str:
    """A text of foreign hand: credentials masked, its end left out where it is long."""
    whole = str(text)
    short = redact(whole[: most + 200])[:most]
    return short + (f" [{len(whole) - most:,} more characters]" if len(whole) > most else "")


def shown(text: str) -> str:
    """What is invisible, or turns the direction of writing, as its number."""
    return text.translate(HIDDEN)


def escape(text: str) -> str:
    """A text of foreign hand inside of markup."""
    return html.escape(shown(text))


class Ours(str):
    """Markup of our own, which a template takes as it is: all foreign text in it is escaped."""

    def __html__(self) -> str:
        return self
