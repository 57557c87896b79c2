"""A table of measured figures: what each module of this package returns, and how the page shows it."""

from dataclasses import dataclass, field

from bench.record import markdown


@dataclass
class Table:
    """Rows of figures under a title, `how` they were measured, and what failed (empty if all went well)."""

    title: str
    how: str
    columns: list[str]
    rows: list[list] = field(default_factory=list)  # one cell per column
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, holds: bool, failure: str) -> bool:
        """Record `failure` unless `holds`, and return `holds`."""
        if not holds:
            self.failures.append(failure)
            print(f"FAILED {failure}", flush=True)
        return bool(holds)

    def markdown(self) -> str:
        """The table as a section of the page."""
        failed = "".join(f"\n* FAILED: {' '.join(failure.split())[:300]}" for failure in self.failures)
        verdict = f"{len(self.failures)} failures.{failed}" if self.failures else "No failures."
        rows = markdown([self.columns, *self.rows])
        return f"## {self.title}\n\n{self.how}\n\n{rows}\n{verdict} {self.seconds:.0f} s.\n"
