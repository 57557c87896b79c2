"""A list of the problems that the checks find."""

from collections import Counter

SHOWN = 3  # findings shown per kind; the rest are counted


class Findings:
    """One line per finding, limited to a few of each kind."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self.lines.setdefault(kind, []).append(line)

    def all(self) -> list[str]:
        """The lines in the order of the checks."""
        out = []
        for kind, lines in self.lines.items():
            more = self.counts[kind] - len(lines)
            out += lines + ([f"... and {more} more: {kind}"] if more else [])
        return out
