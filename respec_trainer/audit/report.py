"""The outcome of an audit: verdicts over all its cells, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from respec_trainer.audit.scores import Strata
from respec_trainer.audit.statistics import Evidence, holm

TESTS = ("tree", "classes", "surprisal")  # of each cell: the joint law, the classes by rank, the surprisal


@dataclass(frozen=True)
class Standard:
    """The error rates that an audit must keep."""

    level: float = 0.01  # probability of failing a correct engine, over all tests of all cells together
    total_variation: float = 0.02  # a law that moves this mass where the actor is uncertain must be detected ...
    power: float = 0.99  # ... with this probability

    def power_of(self, scores: Strata, cells: int) -> float:
        """Return the power of the classes' test of one cell, at the lowest level that Holm's correction uses.

        A bound for all tests of the cell: the others can only find more.
        """
        return scores.uncertain.power(self.total_variation, self.level / (cells * len(TESTS)), scores.classes().df)


@dataclass(frozen=True)
class CellResult:
    name: str
    evidence: Evidence  # of the joint law
    scores: Strata
    draws: int
    tokens: int
    accept_length: float
    seconds: float
    faults: tuple[str, ...] = ()  # found without statistics, such as a response longer than its limit

    @property
    def p_values(self) -> tuple[float, float, float]:
        """The p-values of TESTS."""
        return self.evidence.p_value, self.scores.classes().p_value, self.scores.surprisal().p_value


@dataclass(frozen=True)
class Verdict:
    result: CellResult
    adjusted: float  # the smallest of its p-values after Holm's correction
    power: float
    refuted: bool  # that p-value is below the level
    passed: bool

    @property
    def mark(self) -> str:
        if self.passed:
            return "[green]PASS[/]"
        wrong = self.result.faults or self.refuted
        return "[red]FAIL[/]" if wrong else "[red]FAIL: too few draws[/]"

    def row(self) -> dict:
        """Return the verdict as plain data."""
        result = self.result
        return {
            "cell": result.name,
            "draws": result.draws,
            "tokens": result.tokens,
            "uncertain_tokens": round(result.scores.uncertain.reached),
            "chi_square": result.evidence.statistic,
            "df": result.evidence.df,
            **{f"p_{test}": p for test, p in zip(TESTS, result.p_values, strict=True)},
            "p_adjusted": self.adjusted,
            "total_variation": result.scores.uncertain.total_variation,
            "power": self.power,
            "accept_length": result.accept_length,
            "seconds": result.seconds,
            "faults": list(result.faults),
            "passed": self.passed,
        }


def judge(results: list[CellResult], standard: Standard) -> list[Verdict]:
    """Judge each cell: it passes if no test finds a difference from the right law, and they have the power to."""
    adjusted = holm([p for result in results for p in result.p_values])
    verdicts = []
    for index, result in enumerate(results):
        least = min(adjusted[index * len(TESTS) : (index + 1) * len(TESTS)])
        power, refuted = standard.power_of(result.scores, len(results)), least < standard.level
        passed = not refuted and power >= standard.power and not result.faults
        verdicts.append(Verdict(result, least, power, refuted, passed))
    return verdicts


def table(verdicts: list[Verdict], standard: Standard) -> Table:
    view = Table(title=f"law of the sampled tokens against the actor's own, level {standard.level} over all tests")
    for name in (
        "cell",
        "draws",
        "uncertain",
        *(f"p {test}" for test in TESTS),
        "p (Holm)",
        "TV",
        "power",
        "accept",
        "",
    ):
        view.add_column(name, justify="left" if name == "cell" else "right", no_wrap=name != "")
    for verdict in verdicts:
        row = verdict.row()
        view.add_row(
            row["cell"],
            f"{row['draws']:,}",
            f"{row['uncertain_tokens']:,}",
            *(f"{row[f'p_{test}']:.2g}" for test in TESTS),
            f"{row['p_adjusted']:.2g}",
            f"{row['total_variation']:.4f}",
            f"{row['power']:.3f}",
            f"{row['accept_length']:.2f}",
            verdict.mark + "".join(f"\n{fault}" for fault in row["faults"]),
        )
    return view
