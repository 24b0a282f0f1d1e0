# SPDX-License-Identifier: Apache-2.0
"""Which versions of transformers vtoken is tested with; what differs between them is for `vtoken.compat` to know."""

from __future__ import annotations

import transformers
from packaging.specifiers import SpecifierSet

TESTED = ">=5.5,<5.24"
"""As in pyproject.toml, which only pip heeds."""


def check_transformers() -> None:
    """Refuse to work with a version of transformers that nobody has tried.

    Raises
    ------
    RuntimeError
        If the imported transformers is outside of `TESTED`: from 5.24 on every pass of a wrapped model fails.
    """
    found = transformers.__version__
    if not SpecifierSet(TESTED).contains(found, prereleases=True):
        raise RuntimeError(
            f"transformers {found} is outside of {TESTED}, the versions that vtoken is tested with: "
            f'pip install "transformers{TESTED}".'
        )
