# SPDX-License-Identifier: Apache-2.0
"""Evaluation of reducers with lmms-eval: cells, their runner and store, statistics and reports.

lmms-eval supplies tasks, prompts and scoring. Everything else is ours: driving, resuming, provenance, paired
statistics and failing loudly. Nothing here imports lmms-eval before a cell has to run (`vtoken.eval.harness`).
"""
