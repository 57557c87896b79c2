"""A stand-in for the wandb package that remembers what it is told, and a reader of what the real one writes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BLOCK, WHOLE, LAST = 32768, 1, 4  # of LevelDB's log format


def fake_wandb() -> ModuleType:
    module = ModuleType("wandb")
    module.runs = []

    class Run:
        def __init__(self, **given):
            self.given, self.id, self.logged, self.metrics, self.finished = given, given["id"] or "new", [], [], False
            module.runs.append(self)

        def define_metric(self, name, step_metric):
            self.metrics.append((name, step_metric))

        def log(self, values):
            self.logged.append(values)

        def finish(self):
            self.finished = True

    module.init = lambda **given: Run(**given)
    module.Image = lambda picture: ("image", picture.shape)
    return module


def history(path: Path) -> Iterator[dict]:
    """What `log` was given, from a .wandb file: a log of LevelDB, after 7 bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits; the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after the checksum
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (WHOLE, LAST):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
