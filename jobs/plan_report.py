"""A plan on the terminal, readable at 100 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.plan import Plan, gib
from jobs.recipe import Recipe
from jobs.recipe_schema_stages import AdvanceSection
from jobs.stage_spans import can_end_early
from jobs.stages import lower_is_better, stages_of

WIDTH = 100


def show(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    recipe = plan.recipe
    steps = f"{'at most ' * can_end_early(recipe.train)}{recipe.train.steps} steps"
    console.print(f"[bold]{recipe.run.name}[/bold]  preset {recipe.model.preset}, {steps}\n")
    for part in (facts(plan), *stages_table(recipe), memory_table(plan), resources_table(plan)):
        console.print(part)
    if plan.warnings:
        console.print("[bold]look at[/bold]")
        lines = Table.grid(padding=(0, 1))
        for warning in plan.warnings:
            lines.add_row("-", Text(warning))
        console.print(lines)


def facts(plan: Plan) -> Table:
    """Model, batch and engine, a line for each fact."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    size, batch = plan.size, plan.batch
    micro = "micro batch" if batch.accumulation == 1 else "micro batches"
    workers = "worker" if batch.workers == 1 else "workers"
    data = "problems" if plan.recipe.data.source == "tasks" else "text"
    if plan.recipe.train.stages is None:
        tokens = f"{batch.tokens_per_step:,} tokens per step, {batch.tokens_in_run:,} in the run"
    else:  # whose steps differ
        tokens = f"{'at most ' * can_end_early(plan.recipe.train)}{batch.tokens_in_run:,} tokens in the run"
    if plan.recipe.train.objective == "reward":
        tokens += ": two completions for each row"
    elif batch.epochs is not None:
        tokens += f": {batch.epochs:.2f} times through the {data}"
    elif plan.recipe.data.source != "mixture":
        tokens += ": the text is not prepared yet"
    by_trial = [f"train.micro_batch=auto: about {batch.micro_batch} by this estimate; training finds it by trial"]
    by_trial = by_trial if plan.is_estimated else []
    rows = {
        "model": [
            f"{size.total:,} parameters"
            + (f", {size.active:,} of them used by a token, {size.experts:,} in experts" if size.experts else "")
            + (f", {size.frozen:,} not trained" if size.frozen else "")
        ],
        "batch": [
            f"{batch.global_batch} rows = {batch.workers} {workers} x {batch.accumulation} {micro} x "
            f"{batch.micro_batch} rows",
            tokens,
            *by_trial,
        ],
        "DeepSpeed": plan.engine,
    }
    if plan.search is not None:
        search = plan.search
        rows["search"] = [
            f"{search.trials} trials ({search.how}), {search.at_once} at a time, of at most {search.steps} steps each",
            f"looking for {search.goal}",
        ]
    for name, lines in rows.items():
        for position, line in enumerate(lines):
            grid.add_row("" if position else f"[bold]{name}[/bold]", Text(line))
    return grid


def stages_table(recipe: Recipe) -> list[Table]:
    """The stages in order: how long, in what batches, of what, until when, and what rests; none without stages."""
    train, sources = recipe.train, list(recipe.data.sources or [recipe.data.source])
    if train.stages is None:
        return []
    table = table_of("stages", "steps", "batch")
    for column in ("of what", "ends early when", "frozen"):
        table.add_column(column)
    for section, stage in zip(train.stages, stages_of(recipe, sources), strict=True):
        mixture = {name: weight for name, weight in zip(sources, stage.weights, strict=True) if weight > 0}
        whole = sum(mixture.values())
        table.add_row(
            section.name,
            str(stage.plan.steps),
            f"{stage.global_batch} x {stage.sequence_length}",
            ", ".join(f"{name} {weight / whole:.0%}" for name, weight in mixture.items()),
            way_on(section.advance),
            ", ".join(section.frozen) or "nothing",
        )
    table.caption = "batch: rows x tokens; shares are those of the rows"
    return [table]


def way_on(advance: AdvanceSection | None) -> str:
    """What ends a stage before its last step, in words."""
    if advance is None:
        return "never"
    evaluations = f"{advance.times} evaluation{'s' * (advance.times > 1)} running"
    if advance.when == "plateau":
        return f"{advance.metric} no better in {evaluations}"
    sign = "<=" if lower_is_better(advance.metric) else ">="
    return f"{advance.metric} {sign} {advance.threshold:g} in {evaluations}"


def memory_table(plan: Plan) -> Table:
    """Bytes per worker at each ZeRO stage, the recipe's own marked."""
    train, split = plan.recipe.train, plan.recipe.cluster.expert_parallel > 1
    table = table_of("memory per worker", "parameters", "gradients", "optimizer", "buffers", "activations", "sum")
    for row in plan.stages:
        chosen = row.stage == train.zero_stage
        note = " (this recipe)" if chosen else " (refused)" if split and row.stage == 0 else ""
        parts = (row.parameters, row.gradients, row.optimizer, row.buffers, plan.kept_activations)
        cells = [gib(part) for part in (*parts, plan.device_bytes(row))]
        table.add_row(f"ZeRO {row.stage}{note}", *cells, style="bold" if chosen else "")
    if train.gradient_checkpointing:
        other = f"without gradient checkpointing activations take {gib(plan.activations.full)}"
    else:
        other = f"with gradient checkpointing activations take {gib(plan.activations.checkpointed)}"
    host = "; optimizer states are in the host's memory" if train.offload_optimizer else ""
    table.caption = f"{other}, {plan.activations.how}{host}; the process itself comes on top"
    return table


def resources_table(plan: Plan) -> Table:
    """What is wanted beside what there is."""
    cluster, machine = plan.recipe.cluster, plan.machine
    table = table_of(f"resources of {machine.where}", "wanted", "there", "")
    workers = cluster.workers * (1 if plan.search is None else plan.search.at_once)
    cpus, gpus = workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker
    short = "short" if cluster.address else "shared"
    table.add_row("CPUs", f"{cpus:g}", f"{machine.cpus:g}", enough(cpus <= machine.cpus, short))
    table.add_row("GPUs", f"{gpus:g}", f"{machine.gpus:g}", enough(gpus <= machine.gpus, "short"))
    needed, room = plan.worker_bytes, plan.room_per_worker
    table.add_row("memory per worker", gib(needed), gib(room), enough(needed <= room, "short"))
    return table


def table_of(title: str, *columns: str) -> Table:
    """An empty table in the house's manner; the first column is for names."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def enough(is_enough: bool, otherwise: str) -> str:
    """A verdict in colour."""
    return "[green]enough[/green]" if is_enough else f"[yellow]{otherwise}[/yellow]"
