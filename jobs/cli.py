"""The command ``mmada``: reads the command line, calls one verb, turns what it returns or raises into an exit code.

0 done, 1 the run failed, 2 the user's mistake (one line on stderr), 130 interrupted. A verb's modules are imported
when it runs, so that help costs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jobs.argument_types import file_to_write, float_from, int_from, probability
from jobs.submission import command_line as submission
from jobs.wording import suggestion

EPILOG = """\
RECIPE is a YAML file, or the name of one that comes with mmada:
  {recipes}
Any of its keys can be set after it: mmada train quickstart train.steps=500 run.name=longer
"""


class CommandError(ValueError):
    """A command line that cannot be carried out; the message is one line: argument, value, remedy."""


Add = Callable[..., argparse.ArgumentParser]  # a verb and a line about it, which gives the verb's parser


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and not a page of usage."""

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing.partition(', ')[0]} is missing"
        raise CommandError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader has seen enough: mmada plan … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not is_users_mistake(error):
            raise
        print("mmada:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    raise SystemExit(code)


def run(arguments: list[str]) -> int:
    """Carry out a command line; the exit code. Raises the floors' errors and CommandError."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    verb = arguments[0]
    if not verb.startswith("-") and verb not in VERBS:
        raise CommandError(f"verb={verb} is unknown; {suggestion(verb, VERBS)}")
    own, rest = arguments, []
    if verb in ("bench", "study") and not "".join(arguments[1:2]).startswith("-"):
        own, rest = arguments[:2], arguments[2:]  # what follows such a name is its own, --help too
    options, unknown = parser.parse_known_args(own)
    if hasattr(options, "overrides") and not any(each.startswith("-") for each in unknown):
        options.overrides = [*options.overrides, *unknown]  # argparse takes none of those that stand behind an option
        unknown = []
    if unknown:
        raise CommandError(f"argument={unknown[0]} is not known to mmada {verb}; see mmada {verb} --help")
    options.rest = rest
    return options.call(options)


def is_users_mistake(error: Exception) -> bool:
    """Whether ``error`` is one of the errors by which a floor refuses what it was asked.

    A floor that has not been imported cannot have raised anything, so none is imported to find out.
    """
    kinds: list[type[BaseException]] = [CommandError]
    for module, name in (
        ("jobs.recipe_schema", "RecipeError"),
        ("cluster.errors", "ClusterError"),
        ("mmada.errors", "DataError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(kinds))


def train(options: argparse.Namespace) -> int:
    """Check a recipe and train it."""
    from jobs.recipe import load_recipe
    from jobs.recipe_checks import check, check_run

    recipe = load_recipe(options.recipe, options.overrides)
    check_run(recipe)
    check(recipe)
    from jobs.train import run

    return run(recipe)


def ppo(options: argparse.Namespace) -> int:
    """Check a recipe and improve its policy by reinforcement learning."""
    from jobs.recipe import load_recipe
    from jobs.recipe_checks import check_run
    from jobs.recipe_checks_ppo import check_ppo, completed

    recipe = completed(load_recipe(options.recipe, options.overrides))
    check_run(recipe)
    check_ppo(recipe)
    from jobs.ppo import run

    return run(recipe)


def tune(options: argparse.Namespace) -> int:
    """Check a search and run it."""
    from jobs.recipe import load_values
    from jobs.recipe_checks import check_run
    from jobs.recipe_checks_tune import COMPARED, check_tune

    search = check_tune(load_values(options.recipe, options.overrides))
    check_run(search.recipe, COMPARED)
    from jobs.tuning.sweep import run

    return run(search)


def plan(options: argparse.Namespace) -> int:
    """Show what a recipe needs."""
    from jobs.plan import run
    from jobs.recipe import load_values, recipe_of

    values = load_values(options.recipe, options.overrides)
    if values.get("tune") is None:
        return run(recipe_of(values), options.address)
    from jobs.recipe_checks_tune import check_tune

    search = check_tune(values)
    return run(search.recipe, options.address, search)


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint's model to a folder."""
    from jobs.export import run

    return run(options.checkpoint, options.directory)


def generate(options: argparse.Namespace) -> int:
    """Continue a prompt."""
    from jobs.generate import run

    return run(
        options.checkpoint,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def evaluate(options: argparse.Namespace) -> int:
    """Measure a model on what was held out."""
    if options.samples > 1 and options.temperature == 0:
        raise CommandError(
            f"--samples={options.samples} are all the same at --temperature=0; use a temperature above 0"
        )
    from jobs.evaluate import Settings, run

    names = ("samples", "temperature", "max_new_tokens", "seed", "slots", "show")
    settings = Settings(**{name: getattr(options, name) for name in names}, json_file=options.json)
    return run(options.checkpoint, options.overrides, settings)


def profile(options: argparse.Namespace) -> int:
    """Measure what each part of a recipe's model costs."""
    from jobs.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from jobs.profiling.run import run

    return run(recipe, options.rounds, options.json)


def bench(options: argparse.Namespace) -> int:
    """Run one measurement."""
    import importlib

    names = bench_names()
    if options.name not in names:
        raise CommandError(f"name={options.name} is no bench; {suggestion(options.name, names)}")
    return importlib.import_module(f"jobs.bench.{options.name}").run(options.rest)


def study(options: argparse.Namespace) -> int:
    """Compare variants of a recipe over several seeds."""
    from jobs.studies.catalogue import STUDIES

    if options.name not in STUDIES:
        raise CommandError(f"name={options.name} is no study; {suggestion(options.name, STUDIES)}")
    from jobs.studies.run import run

    return run(options.name, options.rest)


def register(options: argparse.Namespace) -> int:
    """Put a checkpoint's model into MLflow's registry."""
    from jobs.register import run

    return run(options.checkpoint, options.name, options.uri)


def send(options: argparse.Namespace) -> int:
    """Send what a run could not tell MLflow."""
    from jobs.send import run

    return run(options.run_dir, options.uri)


def doctor(options: argparse.Namespace) -> int:
    """Show what this machine has and lacks."""
    from jobs.doctor import run

    return run(deep=options.deep)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "ppo": ppo,
    "tune": tune,
    "plan": plan,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "profile": profile,
    "bench": bench,
    "study": study,
    "register": register,
    "send": send,
    "doctor": doctor,
    **submission.VERBS,
}


def bench_names() -> dict[str, str]:
    """The measurements there are, the modules in jobs/bench that have a ``run``, with what each measures."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "bench").glob("*.py")}
    first_lines = {name: text.splitlines()[0] for name, text in sorted(texts.items()) if "\ndef run(" in text}
    return {name: line.partition("``: ")[2].strip('."') for name, line in first_lines.items()}


def recipe_names() -> list[str]:
    """The recipes that come with mmada."""
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


def build_parser() -> Parser:
    """All verbs with their arguments."""
    parser = Parser(
        prog="mmada",
        description="Train multimodal reasoning models on a Ray cluster: one recipe, one verb.",
        epilog=EPILOG.format(recipes=", ".join(recipe_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", title="verbs", metavar="VERB", parser_class=Parser, required=True)

    def add(verb: str, summary: str, names: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
        each = verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        if names:
            each.formatter_class = argparse.RawDescriptionHelpFormatter
            each.epilog = "\n".join(["names:", *(f"  {name:<11}{words}" for name, words in names.items())])
        each.set_defaults(call=VERBS[verb])
        return each

    _add_runs(add)
    _add_models(add)
    _add_measurements(add)
    submission.add_parsers(add)
    _add_records(add)
    return parser


def _add_runs(add: Add) -> None:
    """Verbs that take a recipe."""
    recipe = f"a YAML file, or one of: {', '.join(recipe_names())}"
    for verb, summary in (
        ("train", "train the model of a recipe, or go on with run.resume=true"),
        ("ppo", "improve the policy of a recipe by reinforcement learning"),
        ("tune", "search the recipe's keys that its section tune names, a whole run for each trial"),
        ("plan", "show what a recipe needs: parameters, memory, batches, resources"),
    ):
        each = add(verb, summary)
        each.add_argument("recipe", metavar="RECIPE", help=recipe)
        each.add_argument(
            "overrides", metavar="section.key=value", nargs="*", default=[], help="replaces a key of the recipe"
        )
        if verb == "plan":
            each.add_argument("--address", metavar="URL", help="a cluster's dashboard: is there room for the recipe?")

    each = add("profile", "measure what each part of a recipe's model costs, and the model without it")
    each.add_argument("recipe", metavar="RECIPE", help=recipe)
    each.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="replaces a key of it")
    each.add_argument("--rounds", type=int_from(2), default=9, metavar="N", help="timed rounds (default: 9)")
    each.add_argument("--json", type=file_to_write, metavar="FILE", help="write every single time there, too")


def _add_models(add: Add) -> None:
    """Verbs that take what has been trained."""
    where = "a checkpoint, a run's folder (its newest good checkpoint) or a saved model"
    each = add("export", "write a checkpoint's model as a Hugging Face folder")
    each.add_argument("checkpoint", metavar="CHECKPOINT", help=where)
    each.add_argument("directory", metavar="DIR", help="a new or empty folder")

    each = add("generate", "continue a prompt, streaming the text")
    each.add_argument("checkpoint", metavar="CHECKPOINT", help=where)
    each.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    each.add_argument("--max-new-tokens", type=int_from(1), default=200, metavar="N", help="at most N (default: 200)")
    each.add_argument("--temperature", type=float_from(0), default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    each.add_argument("--top-p", type=probability, default=0.95, metavar="P", help="nucleus (default: 0.95)")
    each.add_argument("--seed", type=int_from(0), default=0, metavar="S", help="same seed, same text (default: 0)")

    each = add("evaluate", "measure a model on held-out problems, pairs or text")
    each.add_argument("checkpoint", metavar="CHECKPOINT", help=where)
    over = "tasks.… or data.… to measure on something else than its own recipe says"
    each.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help=over)
    each.add_argument("--samples", type=int_from(1), default=1, metavar="K", help="answers per problem (default: 1)")
    each.add_argument("--temperature", type=float_from(0), default=0.0, metavar="T", help="default: 0, which is greedy")
    each.add_argument("--max-new-tokens", type=int_from(1), metavar="N", help="at most N (default: as long as needed)")
    each.add_argument("--seed", type=int_from(0), default=0, metavar="S", help="of the sampling (default: 0)")
    each.add_argument("--slots", type=int_from(1), default=32, metavar="N", help="answers at a time (default: 32)")
    each.add_argument("--show", type=int_from(0), default=0, metavar="N", help="print the first N answers, too")
    each.add_argument("--json", type=file_to_write, metavar="FILE", help="write every answer and figure there, too")

    each = add("register", "put a checkpoint's model into MLflow's registry, as its next version")
    each.add_argument("checkpoint", metavar="CHECKPOINT", help=where)
    each.add_argument("name", metavar="NAME", help="the registered model's name")
    each.add_argument("--uri", metavar="URI", help="an MLflow server or file (default: where its run was recorded)")


def _add_measurements(add: Add) -> None:
    """Verbs that compare, and say so in numbers."""
    own = "one of those below; its own arguments follow, --help among them"
    each = add("bench", "measure, and print the numbers", bench_names())
    each.add_argument("name", metavar="NAME", help=own)

    from jobs.studies.catalogue import STUDIES  # costs no import of torch

    titles = {name: each.title for name, each in STUDIES.items()}
    each = add("study", "compare variants of a recipe over several seeds", titles)
    each.add_argument("name", metavar="NAME", help=own)


def _add_records(add: Add) -> None:
    """Verbs for what runs leave, and for what they need."""
    each = add("send", "send what a run could not tell MLflow while it went on")
    each.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder, <run.dir>/<run.name>")
    each.add_argument("--uri", metavar="URI", help="where the MLflow server is now (default: where it was)")

    each = add("doctor", "show what this machine has, what is missing and how to get it")
    each.add_argument("--deep", action="store_true", help="start Ray and write to an MLflow store, too")


if __name__ == "__main__":
    from jobs import cli  # under its own name, so that there is one CommandError

    cli.main()
