# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval side: driving it, finding tasks by name, reading its scores."""
