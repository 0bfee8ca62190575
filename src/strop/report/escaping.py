"""Text that others wrote, before it goes onto a page: nothing invisible, no credentials, not too long. Floor 2."""

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
"""Characters that are invisible or turn the direction of writing, and what is written in their place."""


def excerpt(text: object, most: int = 4000) -> str:
    """At most `most` characters of a text, credentials masked, and how many more there are."""
    whole = str(text)
    short = redact(whole[: most + 200])[:most]
    return short + (f" [{len(whole) - most:,} more characters]" if len(whole) > most else "")


def visible(text: str) -> str:
    """A text with each of the `HIDDEN` characters as its number, such as \\u200b."""
    return text.translate(HIDDEN)


def escape(text: str) -> str:
    """A text that others wrote, for use inside markup."""
    return html.escape(visible(text))


class Ours(str):
    """Markup that strop made, which a template takes as it is: what others wrote in it is escaped already."""

    def __html__(self) -> str:
        return self
