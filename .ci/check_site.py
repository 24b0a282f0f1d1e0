# SPDX-License-Identifier: Apache-2.0
"""The built documentation must look right without the internet: scripts, styles, fonts and pictures are its own.

    python .ci/check_site.py FOLDER

Links that a reader may click are free to lead elsewhere.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data"}
LINKS = {"stylesheet", "preload", "modulepreload", "icon", "manifest"}
"""Kinds of ``<link>`` that a browser fetches by itself."""
ELSEWHERE = re.compile(r"^(?:https?:)?//", re.I)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.I)


class Fetches(HTMLParser):
    """Collects what a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        given = {name: value or "" for name, value in attrs}
        if tag in LOADED:
            self.found.append(given.get(LOADED[tag], ""))
        elif tag == "link" and LINKS & set(given.get("rel", "").lower().split()):
            self.found.append(given.get("href", ""))


def fetched(path: Path) -> list[str]:
    """Addresses elsewhere that a page or a style sheet fetches."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return IN_STYLES.findall(text)
    page = Fetches()
    page.feed(text)
    return [address for address in page.found if ELSEWHERE.match(address)] + IN_STYLES.findall(text)


def main(folder: str) -> int:
    """Look at every page and style sheet; says on stderr what is fetched from elsewhere."""
    paths = sorted(path for suffix in ("*.html", "*.css") for path in Path(folder).rglob(suffix))
    if not paths:
        raise SystemExit(f"There is no page in {folder}: build the documentation first, see CONTRIBUTING.md.")
    faults = [f"{path.relative_to(folder)} fetches {address}\n" for path in paths for address in fetched(path)]
    sys.stderr.writelines(faults)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
