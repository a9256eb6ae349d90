"""CPU, memory, disk, network and GPU use of the driver, sampled by MLflow's own monitors."""

from collections.abc import Callable
from typing import Any

PREFIX = "system/"


def system_metrics(
    run_id: str,
    uri: str,
    seconds: float,
    log: Callable[[int, dict[str, float]], None],
    first_step: int,
    *,
    ask_server: bool,
) -> Any:
    """MLflow's own sampler, writing through `log`.

    As it comes, it ends at the first request that fails and records nothing of a run shorter than one interval.

    Args:
        run_id: the run, in `uri`.
        seconds: between two samples.
        first_step: number of the first sample, unless the server knows of later ones.
        ask_server: whether to ask it.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            ended = False
            while not ended:
                self.collect_metrics()
                ended = self._shutdown_event.wait(self.sampling_interval)
                self.publish_metrics(self.aggregate_metrics())

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            log(self._logging_step, {self._metrics_prefix + name: value for name, value in metrics.items()})
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    monitor = Monitor(run_id, sampling_interval=seconds, resume_logging=ask_server, tracking_uri=uri)
    monitor._logging_step = max(monitor._logging_step, first_step)
    return monitor
