# SPDX-License-Identifier: Apache-2.0
"""Evaluation of reducers with lmms-eval: cells, their runner and store, statistics and reports.

lmms-eval supplies tasks, prompts and scoring. Everything else is ours: driving, resuming, provenance, paired
statistics and failing loudly. In the order of a run:

`sweeps`      a YAML file becomes cells: one model, one reducer, one task
`executors`   spread the cells over processes, accelerators and nodes
`running`     runs a cell in one process, and measures its cost
`harness`     lmms-eval: its tasks, its evaluation of one task, its scores
`model`       the model that answers, under a reducer
`tasks`       the bundled tasks
`store`       the results folder: records of cells, locks, resuming
`comparison`  finished cells against the unpruned and the random one, with statistics
`report`      tables, HTML page, CSV

Nothing here imports lmms-eval before a cell has to run (`vtoken.eval.harness.driver`). `store` and `comparison` import
no model code: results can be read where no model can be loaded.
"""
