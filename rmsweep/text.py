"""Text from outside, made safe to print: no control characters, no direction marks, nothing that cannot be encoded."""

from __future__ import annotations

import re

MAX_LINE = 2000
# C0 without tab and newline, DEL and C1, line and paragraph separators, direction marks, lone surrogates
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with every character that could drive a terminal, or that UTF-8 cannot hold, written as an escape."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(text: str, limit: int = MAX_LINE) -> str:
    """`text` with every line cut at `limit` characters."""
    return "\n".join(line if len(line) <= limit else f"{line[:limit]}... (cut)" for line in text.split("\n"))
