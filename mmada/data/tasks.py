"""Tasks whose answers can be checked: questions from reasoning-gym, split into training and held out.

A set of tasks is a pure function of its source, the same in every process: nothing is written to disk, and whoever
needs the items draws them anew. ``mmada.data.task_scoring`` scores completions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np

from mmada.data.task_scoring import score_text
from mmada.errors import DataError

# Their items (of word_ladder the answers) follow Python's hash seed, or code that is run to make them: they differ
# from process to process.
UNSTABLE_FAMILIES = ("codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
# A family that mixes others, by a configuration of its own.
COMPOSITE_FAMILY = "composite"

Kind = tuple[str, int]  # a family at a level of difficulty


@dataclass(frozen=True)
class TaskSource:
    """Which tasks to draw.

    Attributes:
        family: reasoning-gym's name of a family, or several, which then take turns.
        difficulty: levels by which every attribute of the family's curriculum is raised, each at most to its last; or
            several, which then take turns.
        seed: another seed gives other items.
        size: items to train on, over all families.
        held_out: items with questions that are not trained on, over all families.
        config: values for fields of the family's own configuration, set after ``difficulty``. With several families
            the keys are families and the values such fields.
        template: the prompt; ``{question}`` stands for the question.

    Raises:
        DataError: a value that no tasks can have.
    """

    family: str | tuple[str, ...]
    difficulty: int | tuple[int, ...] = 0
    seed: int = 0
    size: int = 1000
    held_out: int = 100
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str = "{question}\n"

    def __post_init__(self) -> None:
        families = self.families
        if not families or len(set(families)) < len(families):
            raise DataError(f"tasks.family={list(families)} must name one family or more, each once")
        if "{question}" not in self.template:
            raise DataError(f"tasks.template={self.template!r} has no place for the question; write {{question}} in it")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise DataError(f"tasks.difficulty={list(self.levels)} must name one level or more, each once")
        kinds = len(self.kinds)
        for name, value, smallest in (
            ("difficulty", min(self.levels), 0),
            ("size", self.size, kinds),
            ("held_out", self.held_out, 0),
        ):
            if value < smallest:
                raise DataError(f"tasks.{name}={value} is too small; use {smallest} or more")
        if 0 < self.held_out < kinds:
            what = "a family" if len(self.levels) == 1 else "a level of a family"
            raise DataError(f"tasks.held_out={self.held_out} leaves {what} without items; use {kinds} or more")

    @property
    def families(self) -> tuple[str, ...]:
        """The families by name, in turn."""
        return (self.family,) if isinstance(self.family, str) else tuple(self.family)

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of difficulty, in turn."""
        return (self.difficulty,) if isinstance(self.difficulty, int) else tuple(self.difficulty)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every family at every level, in the order in which they take turns."""
        return tuple((family, level) for level in self.levels for family in self.families)


@dataclass(frozen=True)
class TaskItem:
    """One task. ``index``: its place in its list; ``entry``: what reasoning-gym made, which its scorer asks for.

    ``answer`` is None in families that have a scorer only. ``level``: its difficulty.
    """

    index: int
    family: str
    prompt: str
    answer: str | None
    entry: dict[str, Any] = field(repr=False)
    level: int = 0


class TaskSet:
    """The items of a source and their scorers. ``load_tasks`` makes one."""

    def __init__(self, source: TaskSource, datasets: Mapping[Kind, Any]) -> None:
        self.source = source
        self._datasets = datasets
        drawn = {kind: _draw(source, kind, turn, datasets[kind]) for turn, kind in enumerate(source.kinds)}
        held_out = {kind: entries for kind, (entries, _) in drawn.items()}
        # Levels of a family may share questions: none that is held out at one is learned from at another.
        known = {(family, entry["question"]) for (family, _), entries in held_out.items() for entry in entries}
        train = {
            kind: [entry for entry in entries if (kind[0], entry["question"]) not in known]
            for kind, (_, entries) in drawn.items()
        }
        for (family, level), entries in train.items():
            if not entries:
                raise DataError(
                    f"tasks.difficulty={level} of {family} has no question that is not held out at another level; use "
                    "other levels, or less tasks.held_out"
                )
        self.held_out = self._items(held_out, source.held_out)
        self.train = self._items(train, source.size)

    def _items(self, entries: Mapping[Kind, list[dict[str, Any]]], count: int) -> list[TaskItem]:
        items = []
        for index in range(count):
            turn, number = divmod(index, len(entries))
            family, level = kind = self.source.kinds[number]
            entry = entries[kind][turn % len(entries[kind])]
            prompt = self.source.template.replace("{question}", entry["question"])
            items.append(TaskItem(index, family, prompt, entry["answer"], entry, level))
        return items

    @property
    def num_distinct(self) -> int:
        """Different prompts to train on; fewer than ``len(train)`` where a family has no more."""
        return len({(item.family, item.prompt) for item in self.train})

    @property
    def fingerprint(self) -> str:
        """A hash of every family, prompt and answer: equal where two processes hold the same items."""
        digest = hashlib.sha256()
        for item in (*self.held_out, None, *self.train):
            digest.update(repr(item and (item.family, item.prompt, item.answer)).encode())
        return digest.hexdigest()

    def score(self, item: TaskItem, completion: str) -> float:
        """The score of a completion by the family's own scorer, 0 to 1; surrounding white space does not count.

        Raises:
            Exception: whatever the scorer raises, as some do on a text that is no answer at all.
        """
        with _random_state_kept():
            return score_text(self._datasets[item.family, item.level], item.family, item.entry, completion)


def load_tasks(source: TaskSource) -> TaskSet:
    """Draw the items of ``source``.

    Held-out items are drawn first, each question once; then those to train on, which leave out every question that is
    held out, and are all different as long as the family has more.

    Raises:
        DataError: reasoning-gym is missing; an unknown family, or one that is not the same in every process; a value
            that the family refuses; a family with too few different questions.
    """
    return TaskSet(source, {kind: _dataset(source, *kind) for kind in source.kinds})


def _registry() -> Mapping[str, tuple[type, type]]:
    try:
        import reasoning_gym  # noqa: F401  (registers its families)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f'tasks need the package reasoning-gym ({error}); install it with: pip install "mmada[rl]"'
        ) from error
    return DATASETS


def _dataset(source: TaskSource, family: str, level: int) -> Any:
    """reasoning-gym's data set of one family at one level, long enough for all that ``_draw`` may ask."""
    registry = _registry()
    if family not in registry:
        close = get_close_matches(family, registry, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the families are {', '.join(sorted(registry))}"
        raise DataError(f"tasks.family={family} is unknown; {hint}")
    if family in UNSTABLE_FAMILIES:
        raise DataError(f"tasks.family={family} makes other items in every process; use another family")
    if family == COMPOSITE_FAMILY:
        raise DataError(f"tasks.family={family} mixes families itself; give a list of families instead")
    config, own = _configuration(source, family, level, registry[family][1]), _own_config(source, family)
    place = _config_place(source, family)
    try:
        if hasattr(config, "validate"):
            config.validate()
        with _random_state_kept():
            return registry[family][0](config=config)
    except Exception as error:  # asserted by the library, or a wrong type that it stumbles over
        reason = str(error) or type(error).__name__
        named = [name for name in own if name in reason] or list(own)
        if named:
            values = " and ".join(f"{place}.{name}={own[name]!r}" for name in named)
            raise DataError(f"{values} cannot be used in {family}: {reason}; use another value") from error
        raise DataError(
            f"tasks.difficulty={level} cannot be used in {family}: {reason}; "
            f"use another difficulty, or set the field in {place}"
        ) from error


def _configuration(source: TaskSource, family: str, level: int, config_class: type) -> Any:
    """The family's configuration at this difficulty, with the source's own fields set, not yet validated."""
    from reasoning_gym.factory import create_curriculum, has_curriculum

    fixed = {"seed": _family_seed(source, family, level), "size": _num_draws(source)}
    if has_curriculum(family):
        curriculum = create_curriculum(family)
        for name, attribute in curriculum.attributes.items():
            last = len(attribute.levels) - 1
            curriculum.set_attr_level(name, min(attribute.default_level + level, last))
        config = curriculum.generate_configuration(fixed)
    elif level == 0:
        config = config_class(**fixed)
    else:
        raise DataError(
            f"tasks.difficulty={level}: {family} has no curriculum; use 0, and set fields of its "
            f"configuration in {_config_place(source, family)}"
        )
    known = [name for name in vars(config) if name not in fixed]
    for name, value in _own_config(source, family).items():
        where = f"{_config_place(source, family)}.{name}"
        if name in fixed:
            raise DataError(f"{where} has no meaning; set tasks.{name}")
        if name not in known:
            raise DataError(f"{where} is not a field of {family}; its fields are {', '.join(sorted(known))}")
        setattr(config, name, value)
    return config


def _own_config(source: TaskSource, family: str) -> Mapping[str, Any]:
    if len(source.families) == 1:
        return source.config
    unknown = [name for name in source.config if name not in source.families]
    if unknown:
        raise DataError(
            f"tasks.config.{unknown[0]} is not one of the families of tasks.family; "
            "with several families, give each one's fields under its name"
        )
    own = source.config.get(family, {})
    if not isinstance(own, Mapping):
        raise DataError(f"tasks.config.{family}={own!r} is no mapping; give the family's fields under its name")
    return own


def _config_place(source: TaskSource, family: str) -> str:
    return "tasks.config" if len(source.families) == 1 else f"tasks.config.{family}"


def _family_seed(source: TaskSource, family: str, level: int) -> int:
    """A seed far from that of any other seed and family: the library's item i is that of seed + i.

    The first of several levels draws as it would alone.
    """
    turn = source.levels.index(level)
    digest = hashlib.sha256((f"{source.seed}/{family}" + f"/{level}" * (turn > 0)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _num_draws(source: TaskSource) -> int:
    """Draws of a family after which it counts as having no more questions than those that came."""
    return 10 * (source.size + source.held_out) + 1000


def _draw(source: TaskSource, kind: Kind, turn: int, dataset: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of one family and level with different questions: held out, and as many as can be had to train on."""
    family, num_kinds = kind[0], len(source.kinds)
    num_held_out, num_train = (len(range(turn, count, num_kinds)) for count in (source.held_out, source.size))
    entries: dict[str, dict[str, Any]] = {}
    with _random_state_kept():
        for entry in _entries(dataset, family, _num_draws(source)):
            entries.setdefault(entry["question"], entry)
            if len(entries) == num_held_out + num_train:
                break
    if len(entries) <= num_held_out:
        raise DataError(
            f"tasks.held_out={source.held_out} is too much for {family}, which has {len(entries)} different questions; "
            f"use less, a higher tasks.difficulty, or a wider {_config_place(source, family)}"
        )
    different = list(entries.values())
    return different[:num_held_out], different[num_held_out:]


def _entries(dataset: Any, family: str, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        try:
            entry = dataset[index]
        except Exception as error:  # a configuration that passes the library's own validation and cannot be drawn
            reason = str(error) or type(error).__name__
            raise DataError(
                f"tasks.config: {family} could not make an item ({reason}); use other values of its fields"
            ) from error
        yield entry


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Some families seed or use the process' own generators, which are not theirs."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
