# SPDX-License-Identifier: Apache-2.0
"""Pictures of what reducers keep, side by side."""
