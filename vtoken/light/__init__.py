# SPDX-License-Identifier: Apache-2.0
"""Light layers: decoder layers in which visual rows stay, but compute less than text rows."""

from vtoken.light.layer import LightLayer

__all__ = ["LightLayer"]
