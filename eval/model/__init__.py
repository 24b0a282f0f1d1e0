# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval asks: loading, preprocessing, generation, and what is noted about each sample."""
