"""Work on videos by Ray Data (extra `ray`): actors that hold a model, on one machine or a cluster.

    pool = RayPool("auto")                       # or None: a cluster of this machine alone
    for line in pool.lines(make_work, paths, batch=4): ...

`make_work` makes, in each actor, what turns paths into lines of text. A worker that dies is replaced and its
batch is done again. Videos must have the same paths on all machines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from encoder.errors import ConfigError, FluxChatError, ModelError
from llm_bridge.model_files.checks import first_line

RETRIES = 3  # of a batch whose worker died
Work = Callable[[Sequence[str]], Iterable[str]]


class RayPool:
    """address: of a running cluster, as "auto" or "ray://head:10001"; None starts one on this machine.

    workers: actors; default: one for each GPU, or for every two CPU cores. It belongs to this process until
    `close`. Raises ConfigError without the extra, ModelError where there is no such cluster.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"Ray cannot work with {workers} workers: give 1 or more.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray: Any = _ray()
        own = {} if address else {"include_dashboard": False}
        # Workers import this checkout where it is not installed.
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            self._ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {} if address else {"PYTHONPATH": paths}},
                **own,
            )
        except Exception as error:
            raise ModelError(
                f"Ray cannot be reached at {address or 'this machine'} ({first_line(error)}): start it with "
                "`ray start --head`, or check the address."
            ) from error
        resources = self._ray.cluster_resources()
        self._gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.workers = workers or self._gpus or max(1, cores // 2)
        self._cores = max(1, cores // self.workers)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function gives on a worker's machine; raises what it raises."""
        options = {"num_gpus": 1} if self._gpus else {"num_cpus": self._cores}
        try:
            return self._ray.get(self._ray.remote(**options)(_call).remote(function))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, FluxChatError) else ModelError(_died(error)) from None
        except self._ray.exceptions.RayError as error:
            raise ModelError(_died(error)) from error

    def lines(self, make: Callable[[], Work], paths: Sequence[str], batch: int) -> Iterator[str]:
        """The lines of all paths, as they come; a batch whose workers died RETRIES times has none.

        batch: paths that an actor has at once. What a worker had handed over before it died may come again.
        Raises ModelError when no worker can be made.
        """
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # who asks sees which paths are missing
        blocks = max(1, -(-len(paths) // batch))
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": RETRIES}
        options |= {"num_gpus": 1} if self._gpus else {"num_cpus": self._cores}
        items = ray.data.from_items(
            [{"path": os.fsencode(path)} for path in paths], override_num_blocks=blocks
        )
        made = items.map_batches(
            _Actor,
            fn_constructor_args=(make,),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.workers),
            **options,
        )
        try:
            for row in made.iter_rows():
                yield row["line"]
        except Exception as error:
            if isinstance(error, FluxChatError):
                raise
            raise ModelError(_died(error)) from error


def _call(function: Callable[[], Any]) -> Any:
    return function()


class _Actor:
    """A worker: makes its work once, then does a batch at a time."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self._work = make()

    def __call__(self, batch: Any) -> dict[str, list[str]]:
        return {"line": list(self._work([os.fsdecode(path) for path in batch["path"]]))}


def _died(error: Exception) -> str:
    return f"The workers of Ray cannot work ({first_line(error)[:300]}): see Ray's logs."


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("A cluster needs Ray: pip install 'fluxchat[ray]'.") from None
    return ray


def lost(path: str) -> str:
    """The sentence for a file for which no line came."""
    return f"The worker died at every try with {path!r}: see Ray's logs, or leave this file out."
