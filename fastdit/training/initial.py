"""What a run takes from the network that it starts from: training.init_from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastdit.classes import Classes
from fastdit.errors import counted
from fastdit.training.weights import mismatches

LABELS = "y_embedder.embedding_table.weight"  # a row for each class; the null label's is the last
COMPUTED = ("pos_embed", "rope")  # buffers that the network computes for its own number of patches
STARTS_ANEW = (*COMPUTED, LABELS, "final_layer.", "taps.")  # what a run may have otherwise than its training.init_from
NAMED = 3  # classes in a log line


class Initial(NamedTuple):
    """Weights and their EMA under the official names, the names of their classes, () if unknown, and whether the label
    table has a row for the null label."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    null_row: bool = True


def take_over(
    own: Mapping[str, Tensor], source: Initial, where: str, null_label: int | None, classes: Classes
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """A network's own state dict with the source's tensors in it, weights and EMA, and the names of those that stay.

    `classes`: the network's own. The label table may differ in its classes (`rows_of`), the positions in their number,
    and the final layer in its channels: those start anew, as does a class token. ValueError for any other difference.
    """
    states, kept = [], []
    for theirs in (source.model, source.ema):
        state, kept = {name: tensor.clone() for name, tensor in own.items()}, []
        wrong = [line for line in mismatches(own, theirs) if not line.startswith(STARTS_ANEW)
                 and not (line.startswith("class_token.") and line.endswith(" is missing"))]  # fmt: skip
        if wrong:
            raise ValueError(
                f"training.init_from={where} is another network: {wrong[0]} ({counted(len(wrong), 'difference')}); set "
                "model.variant and the options of model: to those of the source"
            )
        for name, tensor in own.items():
            other = theirs.get(name)
            if name == LABELS and other is not None and other.shape[1:] == tensor.shape[1:]:
                rows = rows_of(classes, null_label, source, len(other))
                state[name][[*rows]] = other[[*rows.values()]].to(tensor)
                if anew := [row for row in range(len(tensor)) if row not in rows]:
                    kept.append(f"{name}{_of(anew, classes, null_label)}")
            elif other is not None and other.shape == tensor.shape and name not in COMPUTED:
                state[name] = other.to(tensor)
            elif other is None or other.shape != tensor.shape:
                kept.append(name)
        states.append(state)
    return states, kept


def rows_of(classes: Classes, null_label: int | None, source: Initial, count: int) -> dict[int, int]:
    """Row of the label table -> the row of the source's, which has `count`, that it starts from.

    Classes go by name if both sides know theirs, and else by number if there are as many; names of one side alone that
    are its numbers are no names. The null label goes with the source's, if it has one.
    """
    theirs, rows = count - source.null_row, {}
    known = bool(classes.names and source.class_names)
    if known and numbered(classes.names) == numbered(source.class_names):
        places = {name: place for place, name in enumerate(source.class_names[:theirs])}
        rows = {label: places[name] for label, name in enumerate(classes.names[: classes.count]) if name in places}
    elif classes.count == theirs:
        rows = {label: label for label in range(theirs)}
    return rows | ({null_label: theirs} if source.null_row and null_label is not None else {})


def numbered(names: Sequence[str]) -> bool:
    """Whether classes are named 0, 1, ... for want of names."""
    return tuple(names) == tuple(map(str, range(len(names))))


def _of(anew: Sequence[int], classes: Classes, null_label: int | None) -> str:
    """Which rows of the label table start anew, in words; "" for all of them."""
    some = [label for label in anew if label != null_label]
    if len(anew) == classes.count + (null_label is not None):
        return ""
    names = [classes.names[label] if label < len(classes.names) else str(label) for label in some[:NAMED]]
    told = f"{len(some)} of {counted(classes.count, 'class', 'classes')}: {', '.join(names)}"
    told += ", ..." if len(some) > NAMED else ""
    parts = [told] * bool(some) + ["the null label"] * (null_label in anew)
    return f" ({' and '.join(parts)})"
