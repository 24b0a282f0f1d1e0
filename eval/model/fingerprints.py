# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of questions and pictures: lmms-eval's own ``doc_hash`` is the same for every document."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vtoken.eval.model.preprocessing import Conversation


def question_key(identity: Sequence[Any], conversation: Conversation) -> str:
    """Fingerprint of a question: what names it (task, split, document, generation arguments), prompt and pixels."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for _, value in _parts(conversation):
        digest.update(value)
    return digest.hexdigest()


def picture_key(conversation: Conversation) -> str:
    """Fingerprint of what is asked about, "" without a picture: questions about one picture are not independent."""
    pixels = [value for kind, value in _parts(conversation) if kind != "text"]
    return hashlib.sha256(b"".join(pixels)).hexdigest()[:16] if pixels else ""


def _parts(conversation: Conversation) -> Iterator[tuple[str, bytes]]:
    """Type and content of every part of a conversation."""
    for part in itertools.chain.from_iterable(message["content"] for message in conversation):
        value = part[part["type"]]
        yield part["type"], value.tobytes() if hasattr(value, "tobytes") else str(value).encode()
