# SPDX-License-Identifier: Apache-2.0
"""Running cells in one process: attempts, their listener, and the measured cost."""
