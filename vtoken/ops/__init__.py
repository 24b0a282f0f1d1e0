# SPDX-License-Identifier: Apache-2.0
"""Pure maths of the reducers: tensors in, indices or tensors out; no model, no configuration.

Batch first. ``k`` is an int or a LongTensor (B,); ``valid`` (B, N) masks ragged rows. Selections are LongTensors
(B, max k) in pick order, padded with -1; a ``k`` beyond the valid tokens of a row means all of them. Distances are
``1 - cos``, ties go to the lowest index, and the maths is float32 whatever the input.
"""

from vtoken.ops.coverage import cover, coverage
from vtoken.ops.determinant import dpp, log_det
from vtoken.ops.greedy import k_center, max_min, max_sum, mmr, sads
from vtoken.ops.merge import Merged, bipartite_merge, cluster_merge, density_peaks, merge_rows, row_sizes
from vtoken.ops.pagerank import page_rank
from vtoken.ops.topk import top_k

__all__ = [
    "Merged",
    "bipartite_merge",
    "cluster_merge",
    "cover",
    "coverage",
    "density_peaks",
    "dpp",
    "k_center",
    "log_det",
    "max_min",
    "max_sum",
    "merge_rows",
    "mmr",
    "page_rank",
    "row_sizes",
    "sads",
    "top_k",
]
