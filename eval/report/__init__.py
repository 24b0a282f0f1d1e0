# SPDX-License-Identifier: Apache-2.0
"""Comparisons to read: tables, CSV, and a page with plots and pictures."""
