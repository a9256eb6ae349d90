"""Which kind of layer stands where, in long and in short form."""

from collections.abc import Sequence


def expand_pattern(name: str, pattern: str | Sequence[str] | None, num_layers: int, default: str) -> list[str]:
    """One kind per layer.

    A list has one entry per layer, each a kind or ``"kind*count"``. A string holds such entries with commas between;
    where it names fewer layers than there are it starts again from the front, and must come out even:
    ``"ssm,ssm,attention"`` for 6 layers names each twice. None is ``default`` everywhere.
    Raises ValueError naming the field.
    """
    if pattern is None:
        return [default] * num_layers
    entries = [entry.strip() for entry in pattern.split(",")] if isinstance(pattern, str) else list(pattern)
    kinds: list[str] = []
    for entry in entries:
        kind, star, count = (part.strip() for part in str(entry).partition("*"))
        if not kind:
            raise ValueError(f"{name} holds an empty entry: {pattern!r}; write a kind there, or one comma less")
        if star and not (count.isdigit() and int(count) > 0):
            raise ValueError(f"{name} holds {entry!r}, whose count is no whole number above 0; write {kind}*2, say")
        kinds += [kind] * (int(count) if star else 1)
    if isinstance(pattern, str) and kinds and num_layers % len(kinds) == 0:
        kinds = kinds * (num_layers // len(kinds))
    if len(kinds) != num_layers:
        raise ValueError(
            f"{name} has {len(kinds)} entries for num_hidden_layers={num_layers}; give one per layer, or as text "
            f"so many that they repeat to {num_layers} evenly"
        )
    return kinds
