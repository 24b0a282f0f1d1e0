# SPDX-License-Identifier: Apache-2.0
"""The executor ``ray``: cells over the processes, GPUs and nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

from vtoken.eval.errors import EvalError, MissingExtraError, reason
from vtoken.eval.executors.base import Executor, check_count
from vtoken.eval.running.listener import Listener, Outcome
from vtoken.eval.store.results import Store
from vtoken.eval.sweeps.cells import Cell

OFFLINE = {"RAY_USAGE_STATS_ENABLED": "0"}  # Ray reads it when it starts a cluster
LOCAL = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
"""Of a cluster on this machine: nothing of it is reachable from outside, and events need little memory."""


@dataclass
class RayExecutor(Executor):
    """Runs every cell in one of several worker processes, each of which keeps its model loaded.

    Workers write into the results folder, which all nodes must see under the same path, and need the same software.
    A cell whose worker is lost goes on in another one where it was. Costs are not measured: machines may differ.

    Parameters
    ----------
    address : str, optional
        Of a running cluster that this machine is a node of: ``"auto"`` or ``"head:6379"``. By default one is started on
        this machine for the time of the run.
    workers : int, optional
        By default as many as the cluster has room for.
    gpus_per_worker : float, optional
        A share lets several workers use one GPU. By default 1 where the cluster has GPUs, else 0.
    cpus_per_worker : int
        Also the threads that a worker computes with.
    retries : int
        How often a cell is tried again after its worker was lost or it raised anything but a complaint about input.
    """

    measures: ClassVar[bool] = False

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1
    retries: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("ray") is None:
            raise MissingExtraError("The executor 'ray'", "ray", "ray")
        if self.workers is not None:
            check_count("workers", self.workers)
        check_count("cpus_per_worker", self.cpus_per_worker)
        check_count("retries", self.retries, 0)
        if self.address is not None and self.address.startswith("ray://"):  # its clients get no streams of events
            raise EvalError(f"address={self.address!r} is not possible: run on a node of the cluster, with 'auto'.")
        gpus = self.gpus_per_worker
        if gpus is not None and (not isinstance(gpus, (int, float)) or gpus < 0 or (gpus > 1 and gpus % 1)):
            raise EvalError(f"gpus_per_worker={gpus!r} is not possible: give 0, a share below 1, or a whole number.")

    def run(self, cells: Sequence[Cell], store: Store, listener: Listener) -> Outcome:
        """See `Executor`."""
        from vtoken.eval.executors.ray_sweep import RaySweep

        if all(store.settle(cell.id) for cell in cells):
            return Outcome(skipped=list(cells))  # without a cluster
        with self._cluster() as total:
            gpus = self.gpus_per_worker
            if gpus is None:
                gpus = 1 if total.get("GPU") else 0
            room = total.get("GPU", 0) / gpus if gpus else total.get("CPU", 0) / self.cpus_per_worker
            if self.workers is None and room < 1:
                raise EvalError(
                    f"The Ray cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs, too few for a "
                    f"worker with cpus_per_worker={self.cpus_per_worker} and gpus_per_worker={gpus:g}."
                )
            resources = {"num_cpus": self.cpus_per_worker, "num_gpus": gpus}
            limits = self.empty_limit, self.skip_broken
            sweep = RaySweep(store, listener, resources, self.workers or int(room), self.retries, limits)
            return sweep.run(cells)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[dict[str, Any]]:
        """Connect or start; yields the resources of the cluster. A connection of the host program is used and kept."""
        import ray

        ours, start = not ray.is_initialized(), LOCAL if self.address is None else {}
        if ours:
            with mock.patch.dict(os.environ, OFFLINE):
                try:
                    ray.init(self.address or "local", log_to_driver=False, logging_level="ERROR", **start)
                except Exception as error:  # Ray raises many types, a plain `Exception` among them
                    where = f"No Ray cluster answers at address={self.address!r}"
                    sentence = where if self.address else "Ray cannot start a cluster on this machine"
                    raise EvalError(f"{sentence}: {reason(error)}") from error
        try:
            yield ray.cluster_resources()
        finally:
            if ours:
                ray.shutdown()
