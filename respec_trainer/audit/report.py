"""The outcome of an audit: verdicts over all its cells, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from respec_trainer.audit.statistics import Evidence, holm


@dataclass(frozen=True)
class Standard:
    """The error rates that an audit must keep."""

    level: float = 0.01  # probability of failing a correct engine, over all cells together
    total_variation: float = 0.02  # a law this far from the right one must be detected ...
    power: float = 0.99  # ... with this probability


@dataclass(frozen=True)
class CellResult:
    name: str
    evidence: Evidence
    draws: int
    tokens: int
    accept_length: float
    seconds: float
    faults: tuple[str, ...] = ()  # found without statistics, such as a response longer than its limit


@dataclass(frozen=True)
class Verdict:
    result: CellResult
    adjusted: float  # the p-value after Holm's correction
    power: float  # at the lowest level that the correction uses
    refuted: bool  # the p-value is below the level
    passed: bool

    @property
    def mark(self) -> str:
        if self.passed:
            return "[green]PASS[/]"
        wrong = self.result.faults or self.refuted
        return "[red]FAIL[/]" if wrong else "[red]FAIL: too few draws[/]"

    def row(self) -> dict:
        """Return the verdict as plain data."""
        result, evidence = self.result, self.result.evidence
        return {
            "cell": result.name,
            "draws": result.draws,
            "tokens": result.tokens,
            "tested_tokens": evidence.draws + evidence.lone,
            "uncertain_tokens": evidence.draws,
            "chi_square": evidence.statistic,
            "df": evidence.df,
            "p": evidence.p_value,
            "p_adjusted": self.adjusted,
            "total_variation": evidence.total_variation,
            "power": self.power,
            "accept_length": result.accept_length,
            "seconds": result.seconds,
            "faults": list(result.faults),
            "passed": self.passed,
        }


def judge(results: list[CellResult], standard: Standard) -> list[Verdict]:
    """Judge each cell: it passes if the test finds no difference from the right law, and has the power to find one."""
    adjusted = holm([result.evidence.p_value for result in results])
    verdicts = []
    for result, p in zip(results, adjusted, strict=True):
        power = result.evidence.power(standard.total_variation, standard.level / len(results))
        refuted = p < standard.level
        passed = not refuted and power >= standard.power and not result.faults
        verdicts.append(Verdict(result, p, power, refuted, passed))
    return verdicts


def table(verdicts: list[Verdict], standard: Standard) -> Table:
    view = Table(title=f"law of the sampled tokens against the actor's own, level {standard.level} over all cells")
    for name in ("cell", "tested", "uncertain", "chi2 / df", "p", "p (Holm)", "TV", "power", "accept", ""):
        view.add_column(name, justify="left" if name == "cell" else "right", no_wrap=name != "")
    for verdict in verdicts:
        row = verdict.row()
        view.add_row(
            row["cell"],
            f"{row['tested_tokens']:,}",
            f"{row['uncertain_tokens']:,}",
            f"{row['chi_square']:.0f} / {row['df']}",
            f"{row['p']:.2g}",
            f"{row['p_adjusted']:.2g}",
            f"{row['total_variation']:.4f}",
            f"{row['power']:.3f}",
            f"{row['accept_length']:.2f}",
            verdict.mark + "".join(f"\n{fault}" for fault in row["faults"]),
        )
    return view
