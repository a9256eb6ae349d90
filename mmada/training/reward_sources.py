"""Where rewards come from: a task's own scorer, a function, a learned model, an endpoint, and their weighted sum."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from mmada.errors import DataError
from mmada.training.rewards import (
    COLUMNS,
    RewardCallError,
    RewardResult,
    RewardSample,
    check_values,
    score_singly_where_raising,
)

if TYPE_CHECKING:
    from mmada.data.tasks import TaskSet

KINDS = ("task", "solved", "function", "model", "http")
_OF_TASKS = ("task", "solved")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0  # before an endpoint is asked again


class RewardSource(Protocol):
    """Something that scores. ``name`` is short, for messages and reports."""

    name: str

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """One result per sample, in order. What goes wrong stands in the results; nothing is raised."""
        ...


class TaskReward:
    """The family's own scorer, 0 to 1 (``mmada.data.tasks``); ``full_marks_only``: 1 for full marks, else 0."""

    def __init__(self, tasks: TaskSet, full_marks_only: bool = False) -> None:
        self.name = "solved" if full_marks_only else "task"
        self._tasks = tasks
        self._full_marks_only = full_marks_only

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """See ``RewardSource``."""
        return [result for sample in samples for result in score_singly_where_raising([sample], self._call, self.name)]

    def _call(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        values = [self._tasks.score(sample.item, sample.completion) for sample in samples]
        if self._full_marks_only:
            values = [float(value >= 1) for value in values]
        return check_values(values, len(samples), self.name)


class FunctionReward:
    """A Python function, ``module:function``, called as TRL calls reward functions.

    It gets lists under the keywords ``prompts``, ``completions``, ``answer``, ``family``, ``entry``, ``index`` and
    ``is_ended``, so it takes ``**kwargs`` for those it has no use for, and returns a list of numbers.

    Raises:
        DataError: there is no such module or function, or it cannot be called so.
    """

    def __init__(self, path: str, field: str = "name") -> None:
        self._function = import_function(path, field)
        self.name = path.rpartition(":")[2]

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """See ``RewardSource``."""
        return score_singly_where_raising(samples, self._call, self.name)

    def _call(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        return check_values(self._function(**_lists(samples)), len(samples), self.name)


class ModelReward:
    """A learned reward model in a folder that ``save_pretrained`` wrote, its tokenizer beside it.

    Components: ``confidence`` and the model's own.
    """

    def __init__(self, folder: str) -> None:
        from mmada.reward_model import MMaDARewardModel
        from mmada.tokenizer import load_tokenizer

        self.name = "model"
        model, loading = MMaDARewardModel.from_pretrained(Path(folder).expanduser(), output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]}, which would be drawn at random")
        self._model = model.eval()
        self._tokenizer = load_tokenizer(str(Path(folder).expanduser().resolve()))

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """See ``RewardSource``."""
        return score_singly_where_raising(samples, self._call, self.name)

    def _call(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        prompts, completions = [each.prompt for each in samples], [each.completion for each in samples]
        outputs = self._model.score(self._tokenizer, prompts, completions)
        results = check_values([output.reward for output in outputs], len(samples), self.name)
        for result, output in zip(results, outputs, strict=True):
            result.components.update(confidence=output.confidence, **output.components)
        return results


class HTTPReward:
    """An endpoint: POST of a JSON object with the lists of a ``FunctionReward``, answered by ``{"rewards": [...]}``.

    Where no answer comes (refused, cut off) or a status of 500 and above, it is asked again up to ``retries`` times.
    After that, and at once for any other status than 200, it is asked sample by sample. No answer at all, or none
    within ``timeout`` seconds for all attempts together, one that is no JSON or one of another shape fails all samples
    of the call.
    """

    def __init__(self, url: str, timeout: float = 30.0, retries: int = 0) -> None:
        self.name = "http"
        self.url = url
        self.timeout, self.retries = timeout, retries

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """See ``RewardSource``."""
        return score_singly_where_raising(samples, self._call, self.name)

    def _call(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        body = json.dumps(_lists(samples)).encode()
        ends, status, text = time.monotonic() + self.timeout, 0, b""
        for attempt in range(self.retries + 1):
            try:
                status, text = self._post(body, ends - time.monotonic())
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == self.retries:
                    raise ValueError(f"{self.url} answered with status {error.code} {error.reason}") from error
            except (OSError, HTTPException) as error:  # refused, unknown host, cut off, too late
                is_late = isinstance(error, TimeoutError) or "timed out" in str(error)
                if is_late or attempt == self.retries:  # asking once more per sample will not help
                    raise RewardCallError(f"{self.name}: {self.url} gave no answer ({error})") from error
            time.sleep(max(0.0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt, ends - time.monotonic())))
        if status != 200:
            raise ValueError(f"{self.url} answered with status {status}; 200 is expected")
        return self._numbers(text, len(samples))

    def _post(self, body: bytes, seconds: float) -> tuple[int, bytes]:
        """Status and text of an answer. Raises HTTPError with its connection closed, OSError or HTTPException."""
        if seconds <= 0:
            raise TimeoutError("timed out")
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def _numbers(self, text: bytes, count: int) -> list[RewardResult]:
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise RewardCallError(f"{self.name}: {self.url} answered with something that is no JSON") from error
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RewardCallError(f'{self.name}: {self.url} answered without "rewards"; a list of numbers is expected')
        return check_values(answer["rewards"], count, f"{self.name} ({self.url})")


class WeightedReward:
    """The weighted sum of parts. A sample that one part cannot score has no reward.

    Components: each part's own value, not weighted, under its name, and its components under ``name/component``.
    """

    def __init__(self, parts: Sequence[tuple[RewardSource, float]]) -> None:
        self.name = "reward"
        self._parts = [(name, part, weight) for name, (part, weight) in zip(_distinct(parts), parts, strict=True)]

    def score(self, samples: Sequence[RewardSample]) -> list[RewardResult]:
        """See ``RewardSource``."""
        scored = [(name, weight, part.score(samples)) for name, part, weight in self._parts]
        return [
            self._sum([(name, weight, results[i]) for name, weight, results in scored]) for i in range(len(samples))
        ]

    def _sum(self, parts: Sequence[tuple[str, float, RewardResult]]) -> RewardResult:
        seconds = sum(result.seconds for _, _, result in parts)
        errors = [
            result.error if result.error.startswith(name) else f"{name}: {result.error}"
            for name, _, result in parts
            if result.error is not None
        ]
        if errors:
            return RewardResult(None, "; ".join(errors), seconds=seconds)
        components, total = {}, 0.0
        for name, weight, result in parts:
            assert result.value is not None
            total += weight * result.value
            components[name] = result.value
            components |= {f"{name}/{key}": value for key, value in result.components.items()}
        return replace(check_values([total], 1, self.name)[0], components=components, seconds=seconds)


def check_parts(parts: Sequence[Mapping[str, Any]], has_tasks: bool = True) -> None:
    """Whether ``build_reward`` can build these, as far as can be told without loading a model or asking an endpoint.

    Raises:
        DataError: naming ``reward.parts[i]`` and the key.
    """
    if not parts:
        raise DataError("reward.parts is empty; give one part or more, such as {kind: task}")
    for i, part in enumerate(parts):
        field, kind, name = f"reward.parts[{i}]", part["kind"], part.get("name")
        if kind not in KINDS:
            raise DataError(f"{field}.kind={kind} is unknown; use one of {', '.join(KINDS)}")
        if not math.isfinite(part.get("weight", 1.0)):
            raise DataError(f"{field}.weight={part['weight']} is not finite; use a number")
        if kind in _OF_TASKS and name is not None:
            raise DataError(f"{field}.name={name} has no meaning with kind: {kind}; remove it")
        if kind in _OF_TASKS and not has_tasks:
            raise DataError(f"{field}.kind={kind} has no tasks to score; add the section tasks, or use another kind")
        if kind not in _OF_TASKS and not name:
            wanted = {"function": "module:function", "model": "a reward model's folder", "http": "a URL"}[kind]
            raise DataError(f"{field}.name is missing; give {wanted}")
        if kind == "function":
            import_function(str(name), f"{field}.name")
        if kind == "model" and not (Path(str(name)).expanduser() / "config.json").is_file():
            raise DataError(f"{field}.name={name} is no folder with a saved reward model; give one with a config.json")
        if kind == "http" and not _is_endpoint(str(name)):
            raise DataError(f"{field}.name={name} is no URL of an endpoint; give one such as http://host:port/path")


def _is_endpoint(url: str) -> bool:
    try:
        split = urlsplit(url)
        return split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        return False


def build_reward(
    parts: Sequence[Mapping[str, Any]], tasks: TaskSet | None = None, timeout: float = 30.0, retries: int = 0
) -> WeightedReward:
    """The reward of a recipe: ``parts`` are mappings with ``kind``, ``name`` and ``weight`` (1 where it is missing).

    ``timeout``: seconds that an endpoint has for a call with all its ``retries``.

    Raises:
        DataError: naming ``reward.parts[i]`` and the key.
    """
    check_parts(parts, tasks is not None)
    return WeightedReward(
        [
            (_source(part, f"reward.parts[{i}]", tasks, timeout, retries), part.get("weight", 1.0))
            for i, part in enumerate(parts)
        ]
    )


def import_function(path: str, field: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, which takes the keywords of a ``FunctionReward``.

    Raises:
        DataError: naming ``field``.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise DataError(f"{field}={path} names no function; write module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module's own code runs here
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{field}={path}: {module_name} cannot be imported ({reason}); put its folder on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise DataError(f"{field}={path}: {module_name} has no {attribute}; name one of its functions")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{field}={path} is a {type(found).__name__}, which cannot be called; name a function")
    keywords = ("prompts", "completions", *COLUMNS)
    try:
        inspect.signature(found).bind(**dict.fromkeys(keywords))
    except TypeError as error:
        raise DataError(
            f"{field}={path} cannot be called with the keywords {', '.join(keywords)} ({error}); "
            "let it take those it needs and **kwargs"
        ) from error
    except ValueError:  # a function written in C may tell nothing about what it takes
        return found
    return found


def _source(part: Mapping[str, Any], field: str, tasks: TaskSet | None, timeout: float, retries: int) -> RewardSource:
    kind, name = part["kind"], str(part.get("name"))
    if kind in _OF_TASKS:
        assert tasks is not None
        return TaskReward(tasks, full_marks_only=kind == "solved")
    if kind == "function":
        return FunctionReward(name, f"{field}.name")
    if kind == "http":
        return HTTPReward(name, timeout, retries)
    try:
        return ModelReward(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{field}.name={name}: no reward model could be loaded ({reason}); give another") from error


def _lists(samples: Sequence[RewardSample]) -> dict[str, list[Any]]:
    """Prompts, completions and every column, a list each."""
    rows = [sample.columns for sample in samples]
    return {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.completion for sample in samples],
        **{column: [row[column] for row in rows] for column in COLUMNS},
    }


def _distinct(parts: Sequence[tuple[RewardSource, float]]) -> list[str]:
    """The parts' names, numbered from the second of a name on."""
    names: list[str] = []
    for part, _ in parts:
        taken = sum(name.partition("#")[0] == part.name for name in names)
        names.append(part.name if not taken else f"{part.name}#{taken + 1}")
    return names
