"""Where a run's workers begin. Imports nothing of the driver's, without which a worker is up sooner."""

from __future__ import annotations

import os
from typing import Any


def train(config: dict[str, Any]) -> None:
    """In every training worker. DeepSpeed, which talks when it is loaded, is never loaded by a driver."""
    only_cpus(config["recipe"])
    from jobs.worker import train_worker

    train_worker(config)


def learn(config: dict[str, Any]) -> None:
    """In every learner of reinforcement learning."""
    only_cpus(config["recipe"])
    from jobs.rl.learner import learner_worker

    learner_worker(config)


def only_cpus(recipe: dict[str, Any]) -> None:
    """In a worker without GPUs of its own, before CUDA and DeepSpeed look around: leave those that others use alone."""
    if not recipe["cluster"]["gpus_per_worker"]:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
