"""The report of ``drumline chaos``, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from drumline.engine.commands.plain_tables import plain_table, print_line
from drumline.engine.testing.census import Census
from drumline.engine.testing.chaos import ChaosReport

_MIB = 1 << 20
_SHOWN = 10


def show_report(report: ChaosReport, console: Console) -> None:
    """Print it."""
    minutes = report.seconds / 60
    happened = sum(count.happened for count in report.faults.values())
    print_line(
        console,
        f"{report.model} on {report.ranks} ranks, {report.streams} streams, seed {report.seed}: "
        f"{happened} faults in {minutes:.1f} minutes",
    )
    print_line(
        console,
        f"requests {report.requests}, tokens {report.tokens}; lost {report.lost}, repeated {report.duplicated}, "
        f"wrong {report.wrong}, ties {report.ties}; at the end {report.state_at_end}, journal {report.journal_at_end}",
    )
    if report.rebalances:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.rebalances.items()))
        print_line(console, f"rebalances of the experts: {counts}")
    console.print(_recoveries(report))
    console.print(_holdings(report.at_start, report.at_end))
    not_seen = sum(count.not_seen for count in report.faults.values())
    failed = report.lost + report.duplicated + report.wrong
    for title, number, lines in (
        ("failures", failed, report.failures),
        ("faults that were not seen to happen", not_seen, report.not_seen),
    ):
        if lines:
            print_line(console, f"{title}, {number}, such as:" if number > _SHOWN else f"{title}, {number}:")
            for line in lines[:_SHOWN]:
                print_line(console, f"  {line}")


def _recoveries(report: ChaosReport) -> Table:
    table = plain_table("fault", "happened", "not seen", "streams", "p50 s", "p99 s", "max s")
    for kind, count in report.faults.items():
        spread = report.recovery.get(kind)
        times = ("", "", "", "")
        if spread is not None:
            times = (str(spread.count), f"{spread.p50_s:.3f}", f"{spread.p99_s:.3f}", f"{spread.max_s:.3f}")
        table.add_row(kind, str(count.happened), str(count.not_seen), *times)
    for name, spread in (("regroup", report.regroup), ("join", report.join)):
        if spread.count:
            table.add_row(
                name, str(spread.count), "", "", *(f"{x:.3f}" for x in (spread.p50_s, spread.p99_s, spread.max_s))
            )
    return table


def _holdings(start: Census, end: Census) -> Table:
    table = plain_table("start > end", "processes", "RSS MiB", "threads", "descriptors", "sockets")
    roles = [*sorted({*start.roles, *end.roles}), "total"]
    for role in roles:
        before = start.total if role == "total" else start.roles.get(role)
        after = end.total if role == "total" else end.roles.get(role)
        cells = []
        for field in ("processes", "rss_bytes", "threads", "file_descriptors", "sockets"):
            scale = _MIB if field == "rss_bytes" else 1
            values = [getattr(one, field) // scale if one is not None else 0 for one in (before, after)]
            cells.append(f"{values[0]} > {values[1]}")
        table.add_row(role, *cells)
    table.add_row("/dev/shm", f"{start.shared_memory} > {end.shared_memory}")
    return table
