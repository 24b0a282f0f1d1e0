# SPDX-License-Identifier: Apache-2.0
"""One forward pass of a wrapped model, and nothing else. `docs/architecture.md` follows one through the files."""
