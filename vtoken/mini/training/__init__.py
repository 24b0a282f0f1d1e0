# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded models, from scratch, on procedurally drawn scenes."""
