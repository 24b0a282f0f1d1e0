# SPDX-License-Identifier: Apache-2.0
"""Embedded models: tiny but really trained vision-language models of stock classes, shipped with the package.

They exist to compare reducers and to test; their numbers do not predict those of a 7B model.

    model, processor = vtoken.mini.load("mini-llava")
"""

from vtoken.mini.loader import folder, learned, load, names

__all__ = ["folder", "learned", "load", "names"]
