"""Makes text from data and other outside sources safe for a terminal."""

from __future__ import annotations

import unicodedata

_GLYPHS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
# Characters that change the direction or joining of the text after them, and line ends other than \n.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def visible(text: str, keep_lines: bool = False) -> str:
    """Escape every control, format and bidirectional character.

    >>> visible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(ch if ch == "\n" and keep_lines else _visible(ch) for ch in text)


def glyphs(text: str) -> str:
    """Escape the text of a token like `visible`, with a glyph for each space and line end."""
    return "".join("·" if ch == " " else _GLYPHS.get(ch) or _visible(ch) for ch in text)


def _visible(ch: str) -> str:
    if ch.isprintable() and unicodedata.category(ch) not in _HIDDEN:
        return ch
    if ch == " ":
        return ch
    code = ord(ch)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
