# SPDX-License-Identifier: Apache-2.0
"""A page on which one model answers twice: as it is, and with a reducer."""
