# SPDX-License-Identifier: Apache-2.0
"""Finished cells read back, and compared question by question with intervals and tests."""
