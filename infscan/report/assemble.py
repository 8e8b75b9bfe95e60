"""One HTML file that needs nothing else: the template, its style and script under a strict policy, and the data.

Data never becomes markup or code. What is small is in one island of JSON in which no character can end it; what is
large is in chunks (JSON, deflate, base64), which the page decodes when they are looked at. The script shows both as
text.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from infscan.storage import Store

_TEMPLATES = "infscan://report/page"
SCRIPTS = ("data.js", "dom.js", "plots.js", "rows.js", "page.js")
# In JSON these stand inside strings only, where \uXXXX means the same; no parser of HTML can then see a tag or comment.
_UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'"}
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def island(value: Any) -> str:
    """JSON, ASCII alone, that HTML can hold anywhere: `</script>`, `<!--` and `]]>` are spelt with escapes.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(_UNSAFE)


def chunk(value: Any) -> str:
    """JSON in deflate (zlib) in base64: no character of it means anything to HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def csp_hash(text: str) -> str:
    """What a Content-Security-Policy calls exactly this script or style."""
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


@dataclass
class Archive:
    """Chunks, held below a size: when one more does not fit, those of the deepest level are dropped, everywhere alike.

    Level 0 is never dropped.
    """

    most_bytes: int
    chunks: dict[int, tuple[int, str]] = field(default_factory=dict)
    size: int = 0
    number: int = 0
    limit: int = 1 << 30

    def add(self, level: int, value: Any) -> int:
        """The chunk's number; `kept` says at the end whether it is still there."""
        self.number += 1
        if level < self.limit:
            text = chunk(value)
            self.chunks[self.number] = (level, text)
            self.size += len(text)
            while self.size > self.most_bytes and self._drop_deepest():
                pass
        return self.number

    def kept(self, number: int) -> bool:
        return number in self.chunks

    def _drop_deepest(self) -> bool:
        deepest = max(level for level, _ in self.chunks.values())
        if deepest == 0:
            return False
        self.limit = deepest
        for number in [number for number, (level, _) in self.chunks.items() if level == deepest]:
            self.size -= len(self.chunks.pop(number)[1])
        return True


def assemble(title: str, index: Any, archive: Archive) -> bytes:
    """The page's bytes: the same for the same arguments."""
    templates = Store(_TEMPLATES)
    style = templates.read("page.css").decode()
    script = "\n".join(templates.read(name).decode() for name in SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {csp_hash(script)}",
            f"style-src {csp_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    chunks = "\n".join(
        f'<script type="application/x-deflate" id="chunk-{number}">{text}</script>'
        for number, (_, text) in archive.chunks.items()
    )
    slots = {
        "policy": html.escape(policy, quote=True).replace("&#x27;", "'"),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "index": island(index),
        "chunks": chunks,
    }
    # In one pass: what fills a slot is not looked at again.
    page = _SLOT.sub(lambda slot: slots[slot[1]], templates.read("page.html").decode())
    return page.encode(errors="replace")
