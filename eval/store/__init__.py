# SPDX-License-Identifier: Apache-2.0
"""The results folder: files of cells, their locks, and the log of answers of a cell at work."""
