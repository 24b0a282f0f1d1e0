# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval finds through the entry point ``lmms_eval.models``: ``lmms-eval --model vtoken`` works."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that vtoken adds; light, because lmms-eval calls this on every import."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("vtoken", chat_class_path="vtoken.eval.model.reduced.ReducedModel")]
