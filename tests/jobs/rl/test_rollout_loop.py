"""The driver's half on real actors: the test is the learner, who begins, takes batches and publishes weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from cluster.actor_pool import ActorPool, ActorResources, PoolEvent
from cluster.exchange import Exchange, Stopped
from cluster.session import RaySession
from cluster.weights import fetch, pack, publish
from jobs.rl.evaluation_loop import EvaluationLoop
from jobs.rl.experience import Experience
from jobs.rl.ledger import DRIVER_FILE, LedgerFile
from jobs.rl.messages import Probe
from jobs.rl.policy_source import REFERENCE
from jobs.rl.reward_worker import RewardWorker
from jobs.rl.rollout_loop import RolloutLoop
from jobs.rl.rollout_worker import RolloutWorker
from jobs.task_source import load_recipe_tasks
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config
from mmada.tokenizer import ByteTokenizer
from tests.jobs.rl.experiences import small_recipe

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

WAIT_S = 90
PROMPTS, SAMPLES = 8, 2


class NoEvaluation(EvaluationLoop):
    """Nothing is due here; ``tests/jobs/rl/test_evaluation_loop.py`` has what is."""

    def is_due(self, version: int) -> bool:
        return False


class Stage:
    """Pools that all tests share, and a loop for each."""

    def __init__(self, folder: Path, functions: Path) -> None:
        self.folder, self.functions = folder, functions
        self.recipe = small_recipe(
            folder,
            **{
                "reward.parts": '[{kind: function, name: "rewards_that_fail:length"}]',
                "reward.timeout": 4,
                "reward.retries": 0,
                "reward.batch": 4,
                "ppo.max_new_tokens": 24,
                "ppo.iterations": 3,
                "ppo.max_reward_failures": 0.5,
                "ppo.kl_coefficient": 0,
            },
        )
        self.tasks = load_recipe_tasks(self.recipe)
        torch.manual_seed(0)
        self.model = MMaDAForCausalLM._from_config(build_config("debug", num_experts=0))
        self.model.save_pretrained(folder / REFERENCE)
        self.events: list[PoolEvent] = []
        self.loops = 0
        values = self.recipe.model_dump()
        arguments = {"recipe": values, "run_dir": str(folder), "threads": 1}
        limits = {"start_timeout_s": WAIT_S, "max_replacements": 3, "on_event": self.events.append}
        free = ActorResources(num_cpus=0)
        self.rollouts = ActorPool(RolloutWorker, arguments, 2, resources=free, task_timeout_s=30, **limits)
        self.rewards = ActorPool(
            RewardWorker,
            {"recipe": values, "folder": str(functions)},
            2,
            resources=free,
            task_timeout_s=4,
            retries=0,
            **limits,
        )

    def mode(self, name: str) -> None:
        (self.functions / "mode").write_text(name)

    def weights(self, version: int, scale: float = 1.0):
        """A reference to the model's weights under a version's number."""
        return publish(pack(((name, scale * each) for name, each in self.model.named_parameters()), version))

    @contextmanager
    def loop(self, **settings):
        """A loop on the pools in a thread, with the exchange that it and the test meet at."""
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self.events.clear()
        for pool in (self.rollouts, self.rewards):  # which have one loop in a run
            pool.cancel_all()
        assert self.recipe.ppo is not None
        recipe = self.recipe.model_copy(update={"ppo": self.recipe.ppo.model_copy(update=settings)})
        exchange = Exchange.start()
        self.loops += 1
        for _ in range(self.loops):  # so that no two loops on these pools have learners of one number
            exchange.begin(0)
        ledger = LedgerFile(self.folder / DRIVER_FILE)
        evaluation = NoEvaluation(recipe.ppo, 0, {}, lambda version, count: None)
        loop = RolloutLoop(
            recipe,
            self.tasks,
            ByteTokenizer(),
            exchange,
            self.rollouts,
            self.rewards,
            ledger,
            evaluation,
            lambda iteration, scored: None,
        )
        thread = threading.Thread(target=loop.run, daemon=True)
        thread.start()
        try:
            yield loop, exchange
        finally:
            loop.is_over = True
            thread.join(WAIT_S)
            exchange.close()
            ledger.close()
        assert not thread.is_alive()

    def dropped(self) -> list[dict]:
        """The ledger's lines about what was dropped."""
        lines = (self.folder / DRIVER_FILE).read_text().split("\n")
        return [line for line in map(json.loads, filter(None, lines)) if line["event"] == "dropped"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory):
    folder, functions = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("functions")
    shutil.copy(Path(__file__).with_name("rewards_that_fail.py"), functions)
    with RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder / "ray"):
        stage = Stage(folder, functions)
        with stage.rollouts, stage.rewards:
            yield stage


@pytest.fixture(autouse=True)
def well(stage: Stage) -> None:
    stage.mode("well")


def taken(exchange: Exchange, iteration: int) -> Experience:
    return ray.get(exchange.take(iteration, WAIT_S))


def contents(batch: Experience) -> tuple:
    return batch.names, batch.input_ids_NS.tolist(), batch.completion_lengths_N.tolist(), batch.scores_N.tolist()


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> Experience:
    """The first batch as it is when nothing happens."""
    stage.mode("well")
    with stage.loop() as (_, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        return taken(exchange, 0)


def test_a_batch_holds_every_sample_with_its_score(stage: Stage, undisturbed: Experience):
    batch = undisturbed
    assert batch.names == [(slot, sample) for slot in range(PROMPTS) for sample in range(SAMPLES)]
    assert batch.versions_N.tolist() == [0] * len(batch)
    tokenizer = ByteTokenizer()
    for row in range(len(batch)):
        first, length = batch.prompt_lengths_N[row], batch.completion_lengths_N[row]
        text = tokenizer.decode(batch.input_ids_NS[row, first : first + length], skip_special_tokens=True)
        assert batch.scores_N[row] == len(text)
        assert (batch.logprobs_NC[row, :length] < 0).all() and (batch.logprobs_NC[row, length:] == 0).all()
    assert len({tuple(row) for row in batch.input_ids_NS.tolist()}) == len(batch)  # no sample is another's copy
    assert batch.metrics["reward"] == pytest.approx(batch.scores_N.mean())
    assert batch.metrics["reward_part.length"] == pytest.approx(batch.scores_N.mean())


def wait_until(condition, what: str):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["rollouts", "rewards"])
def test_a_killed_actor_changes_nothing_but_time(stage: Stage, undisturbed: Experience, kind: str):
    stage.mode("slow")
    pool = getattr(stage, kind)
    with stage.loop() as (_, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        busy = []
        wait_until(lambda: busy or busy.extend(a for a in pool._actors if a.call and a.call.kind == "task"), "a task")
        os.kill(busy[0].pid, signal.SIGKILL)
        batch = taken(exchange, 0)
        wait_until(lambda: "replaced" in {event.kind for event in stage.events}, "a replacement")
    assert contents(batch) == contents(undisturbed)
    assert np.abs(batch.logprobs_NC - undisturbed.logprobs_NC).max() < 1e-5
    assert "died" in {event.kind for event in stage.events}
    assert stage.dropped() == []


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("raises", "the scorer is out of order"), ("nan", "gave nan"), ("hangs", "hung: its task took more than 4 s")],
)
def test_a_failed_reward_drops_its_trajectories_alone(stage: Stage, undisturbed: Experience, mode: str, reason: str):
    stage.mode(mode)
    with stage.loop() as (loop, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        prompts = None
        batch = taken(exchange, 0)
    lines = [json.loads(line) for line in (stage.folder / DRIVER_FILE).read_text().split("\n") if line]
    prompts = next(line["prompts"] for line in lines if line["event"] == "drawn")
    marked = {slot for slot, number in enumerate(prompts) if number % 4 == 0}
    assert 0 < len(marked) < PROMPTS
    left = [row for row, (slot, _) in enumerate(undisturbed.names) if slot not in marked]
    assert batch.names == [undisturbed.names[row] for row in left]
    assert batch.scores_N.tolist() == undisturbed.scores_N[left].tolist()
    assert {(line["slot"], line["sample"]) for line in stage.dropped()} == {
        (slot, sample) for slot in marked for sample in range(SAMPLES)
    }
    assert all(reason in line["reason"] for line in stage.dropped()), stage.dropped()
    assert batch.metrics["rewards_failed"] == len(marked) * SAMPLES


@pytest.mark.parametrize(
    ("mode", "reason"), [("too few", "gave 3 numbers for 4 samples"), ("one number", "gave float 1.0 for 4 samples")]
)
def test_a_reward_of_the_wrong_shape_ends_the_run(stage: Stage, mode: str, reason: str):
    stage.mode(mode)
    with stage.loop() as (loop, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        with pytest.raises(Stopped, match=reason):
            taken(exchange, 0)
    assert reason in loop.failure and "ppo.max_reward_failures=0.5" in loop.failure


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_sampling_runs_ahead_as_far_as_it_may(stage: Stage, staleness: int):
    with stage.loop(max_staleness=staleness) as (loop, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        for iteration in range(3):
            ahead = min(iteration + staleness, 2)
            batch = taken(exchange, ahead)  # what may be sampled before this iteration has been learned from
            assert (batch.versions_N >= ahead - staleness).all() and (batch.versions_N <= iteration).all()
            wait_until(lambda ahead=ahead: loop.next == min(ahead + 1, 3), "the next iteration's start")
            time.sleep(0.1)
            assert loop.next == ahead + 1
            exchange.publish(iteration + 1, ([stage.weights(iteration + 1)], None))


def test_learners_that_begin_again_get_the_same_batches(stage: Stage, undisturbed: Experience):
    with stage.loop() as (_, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        taken(exchange, 0)
        exchange.publish(1, ([stage.weights(1)], None))
        second = taken(exchange, 1)
        exchange.publish(2, ([stage.weights(2, scale=1.1)], None))
        exchange.begin(0)  # the learners died, and their newest checkpoint is the start
        exchange.publish(0, ([stage.weights(0)], None))
        assert contents(taken(exchange, 0)) == contents(undisturbed)
        exchange.publish(1, ([stage.weights(1)], None))
        assert contents(taken(exchange, 1)) == contents(second)


def test_learners_that_die_when_they_may_already_go_get_what_they_miss(stage: Stage, undisturbed: Experience):
    """The last version is published before the last checkpoint is whole."""
    with stage.loop() as (loop, exchange):
        exchange.begin(0)
        for version in range(4):
            exchange.publish(version, ([stage.weights(version)], None))
            released = exchange.take(version, WAIT_S)
        assert ray.get(released) is None and loop.next == 3  # they may go, and die instead
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], None))
        assert contents(taken(exchange, 0)) == contents(undisturbed)
        for version in range(1, 4):
            exchange.publish(version, ([stage.weights(version)], None))
            released = exchange.take(version, WAIT_S)
        assert ray.get(released) is None and loop.failure is None


def probe_of(stage: Stage, batch: Experience) -> Probe:
    first, length = int(batch.prompt_lengths_N[0]), int(batch.completion_lengths_N[0])
    ids = batch.input_ids_NS[0].tolist()
    return Probe([ids[:first]], [ids[first : first + length]], [batch.logprobs_NC[0, :length].tolist()])


def test_weights_that_are_not_the_learners_end_the_run(stage: Stage, undisturbed: Experience):
    with stage.loop() as (loop, exchange):
        exchange.begin(0)
        exchange.publish(0, ([stage.weights(0)], probe_of(stage, undisturbed)))
        batch = taken(exchange, 0)
        assert batch.metrics["probe_logprob_gap"] < 1e-5
        exchange.publish(1, ([stage.weights(1, scale=1.2)], probe_of(stage, undisturbed)))
        with pytest.raises(Stopped, match="ppo.max_logprob_gap"):
            taken(exchange, 1)
    assert "log-probabilities at version 1 differ" in loop.failure


def test_damaged_and_misnumbered_weights_end_the_run(stage: Stage):
    for payload, reason in (
        (publish(pack([(name, each) for name, each in stage.model.named_parameters()], 5)), "not of version 0"),
        (publish(_flipped(stage)), "damaged"),
    ):
        with stage.loop() as (loop, exchange):
            exchange.begin(0)
            exchange.publish(0, ([payload], None))
            with pytest.raises(Stopped, match=reason):
                taken(exchange, 0)
        assert reason in loop.failure


@ray.remote(num_cpus=0)
class Publisher:
    """Owns what it publishes."""

    def publish(self, packed):
        return [ray.put(packed)]


def _flipped(stage: Stage):
    packed = pack(((name, each) for name, each in stage.model.named_parameters()), 0)
    packed.buffer[1000] ^= 1
    return packed


def test_a_reason_that_nobody_had_read_yet_is_not_lost(stage: Stage):
    with stage.loop() as (loop, exchange):
        loop.is_over = True  # the learners have ended, and the loop notices before it reads why
        time.sleep(2)
        assert loop.failure is None
        exchange.stop("loss of iteration 2 is nan")
        loop.run()
        assert loop.failure == "loss of iteration 2 is nan"


def test_weights_of_replaced_learners_are_no_version_of_those_that_follow(stage: Stage):
    actor = RolloutWorker(stage.recipe.model_dump(), str(stage.folder), threads=1)
    actor.load(1, 3, [stage.weights(3)], None)
    assert actor.version == 3
    publisher = Publisher.remote()
    lost = ray.get(publisher.publish.remote(stage.weights(2)), timeout=WAIT_S)
    ray.kill(publisher)
    wait_until(lambda: fetch(lost[0], 1) is None, "the weights to be lost with who had them")
    loaded = actor.load(2, 2, lost, None)
    assert (loaded.problem, actor.version) == (None, None)
    assert actor.sample([], 2).trajectories is None
