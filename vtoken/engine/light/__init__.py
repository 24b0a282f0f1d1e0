# SPDX-License-Identifier: Apache-2.0
"""Light layers at work: decoder layers in which visual rows stay, but compute less than text rows."""
