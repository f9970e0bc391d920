"""`python -m bench.report FILE...`: the summaries of docs/performance.md, from what `python -m bench --out` wrote."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

OURS = "kda-cute"
HEADER = """\
| case | implementation | graph us (quartiles) | x floor | GB/s | % of a copy | profiler us | eager us (quartiles) \
| host us | first call s | o against fp64 |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    """All that was measured of one implementation in one case."""
    if row["refused"]:
        return f"| {row['case']} | {row['label']} | {_cell(row['refused'])} |" + " |" * 8
    graph = "not captured: " + _cell(row["no_graph"]) if row["no_graph"] else _quartiles(row, "graph_us")
    ratio = f"{row['graph_us'] / row['floor_us']:.2f}" if row["graph_us"] else ""
    err = "" if row["err_o"] is None else f"{row['err_o']:.1e}"
    cells = (
        row["case"], row["label"], graph, ratio, _number(row["gb_s"]), _number(row["copy_percent"]),
        _number(row["profiler_us"]), _quartiles(row, "eager_us"), _number(row["host_us"]),
        "" if row["first_s"] is None else f"{row['first_s']:.2f}", row["wrong"] or err,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def short(row: Row) -> str:
    us = time_us(row) or row["eager_us"]
    return f"{row['label']} " + ("refused" if row["refused"] else "wrong" if row["wrong"] else f"{_number(us)} us")


def table(rows: Iterable[Row]) -> str:
    return "\n".join([HEADER, *map(line, rows)])


def summary(rows: Sequence[Row]) -> str:
    """One suite: kda-cute beside the best peer, case by case, the geometric means, and what peers refused."""
    out = [
        "| case | kda-cute us | x floor | % of a copy | best peer | peer, us | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    best_ratios: list[float] = []
    ratios: dict[str, list[float]] = {}  # by peer
    for name in dict.fromkeys(row["case"] for row in rows):
        case = [row for row in rows if row["case"] == name]
        ours = next((row for row in case if row["impl"] == OURS), None)
        us = time_us(ours) if ours else None
        peers = {row["label"]: t for row in case if row["peer"] and (t := time_us(row)) is not None}
        best = min(peers, key=lambda label: peers[label], default=None)
        state = "not run" if ours is None else "refused" if ours["refused"] else "wrong"
        cells = [name, state, "", "", best or "none ran", "", ""]
        if best:
            cells[5] = _number(peers[best])
        if us and ours:
            cells[1:4] = _number(us), f"{us / ours['floor_us']:.2f}", f"{100 * ours['floor_us'] / us:.0f}"
            if best:
                cells[6] = f"{peers[best] / us:.2f}"
                best_ratios.append(peers[best] / us)
            for label, peer_us in peers.items():
                ratios.setdefault(label, []).append(peer_us / us)
        out.append(f"| {' | '.join(cells)} |")
    if best_ratios:
        out += ["", f"Geometric mean of the speed-up: {_mean(best_ratios)} over the best peer; over each: "
                + ", ".join(f"{label} {_mean(r)}" for label, r in ratios.items()) + "."]  # fmt: skip
    notes = _notes(rows)
    if notes:
        out += ["", *notes]
    return "\n".join([*out, "", conditions(rows)])


def summaries(rows: Sequence[Row]) -> str:
    """A summary for each suite, under its name if there are several."""
    names = dict.fromkeys(row["suite"] for row in rows)
    suites = {name: summary([row for row in rows if row["suite"] == name]) for name in names}
    if len(suites) == 1:
        return suites.popitem()[1]
    return "\n\n".join(f"### {suite}\n\n{text}" for suite, text in suites.items())


def conditions(rows: Sequence[Row]) -> str:
    """What every figure is under."""

    def all_of(key: str) -> str:
        return " and ".join(dict.fromkeys(str(row[key]) for row in rows))

    copies = sorted({round(row["copy_gb_s"]) for row in rows})
    copy = f"{copies[0]}" if len(copies) == 1 else f"{copies[0]} to {copies[-1]}"
    versions = dict.fromkeys(
        f"{row['label']} {row['version']}" for row in rows if row["version"] and not row["refused"]
    )
    return (
        f"{all_of('gpu')}, torch {all_of('torch')}, CUDA {all_of('cuda')}, commit {all_of('commit')}; "
        f"a device copy moves {copy} GB/s. Versions: {', '.join(versions)}."
    )


def time_us(row: Row) -> float | None:
    """GPU time: of the graph, or where there is none the profiler's, which leaves gaps out. None for a wrong result."""
    return None if row["wrong"] else row["graph_us"] or row["profiler_us"]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def read(paths: Iterable[str]) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        with open(path) as file:
            rows += json.load(file)
    return rows


def _notes(rows: Sequence[Row]) -> list[str]:
    """A line for each thing that a reader of the table has to know."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    where: dict[str, list[str]] = {}
    for row in rows:
        if not row["peer"] and row["impl"] != OURS:
            continue
        if row["refused"]:
            note = f"does not run: {row['refused']}"
        elif row["no_graph"]:
            note = f"time from the profiler, no CUDA graph: {row['no_graph']}"
        else:
            continue
        where.setdefault(f"{row['label']} {note}", []).append(row["case"])
    ran = [row for row in rows if row["peer"] and not row["refused"]]
    given = dict.fromkeys(f"- {row['label']} is given {row['given']}." for row in ran if row["given"])
    wrong = [f"- {row['label']}, {row['case']}: {row['wrong']}." for row in rows if row["wrong"]]
    return [
        *given,
        *(f"- {'; '.join(n) if len(n) < len(cases) else 'All cases'}: {note}." for note, n in where.items()),
        *wrong,
    ]


def _mean(values: Sequence[float]) -> str:
    return f"{geometric_mean(values):.2f} ({len(values)} case{'s' * (len(values) > 1)})"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.1f}"


def _quartiles(row: Row, key: str) -> str:
    spread = row[f"{key}_quartiles"]
    return _number(row[key]) + (f" ({_number(spread[0])}-{_number(spread[1])})" if spread else "")


def _cell(text: str) -> str:
    return text.replace("|", "/")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", nargs="+")
    parser.add_argument("--all", action="store_true", help="every row with all that was measured")
    options = parser.parse_args()
    rows = read(options.file)
    print(table(rows) if options.all else summaries(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
