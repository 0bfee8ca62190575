"""A row as it was read, and the refusal of one. Floor 2.

In: nothing. Out: the two types that every other module of this room passes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strop.errors import DataError
from strop.redact import redact
from strop.types import Origin


class RowRefused(ValueError):  # noqa: N818 (it becomes an error only where rows may not be skipped)
    """A row that cannot be trained on. Never reaches a user: it becomes a DataError, or a counted skip.

    Args:
        reason: short machine name in snake_case, what the counts go by.
        found, expected, fix: as in DataError.
    """

    def __init__(self, reason: str, found: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(reason, found)
        self.reason, self.found, self.expected, self.fix = reason, found, expected, fix

    def at(self, origin: Origin) -> DataError:
        """The same refusal as the error that stops a run."""
        fix = self.fix or "fix the row, or set dataset.on_error: skip to leave such rows out and count them"
        return DataError(f"{self.found} [{self.reason}]", where=str(origin), expected=self.expected, fix=fix)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. Exactly one of: `data` (read), `refusal` (unreadable), neither (a blank line).

    raw: the line as bytes where there is one, for rejected.jsonl.
    """

    origin: Origin
    data: Mapping[str, Any] | None = None
    refusal: RowRefused | None = None
    raw: bytes | None = None

    @property
    def raw_text(self) -> str:
        """The row as text; bytes that are not UTF-8 as backslash escapes."""
        if self.raw is not None:
            return self.raw.decode("utf-8", errors="backslashreplace")
        return json.dumps(self.data, ensure_ascii=False, default=str)

    def rejected(self, reason: str) -> dict[str, Any]:
        """What rejected.jsonl holds of it; what looks like a credential is masked."""
        where = {"file": self.origin.file, "line": self.origin.line}
        return {**where, "reason": reason, "raw": redact(self.raw_text)}
