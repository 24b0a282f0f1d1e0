# SPDX-License-Identifier: Apache-2.0
"""Reducer presets and sweeps, shipped as package data."""
