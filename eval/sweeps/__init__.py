# SPDX-License-Identifier: Apache-2.0
"""From a sweep file to cells: schema, reducers times budgets, and the plan before a run."""
