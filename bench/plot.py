"""`python -m bench.plot FILE...`: pictures of the rows that `python -m bench --out` wrote. Needs matplotlib, no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .report import OURS, Row, read, time_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FLOOR = "floor"
GATES = ("weak", "mixed", "prod")  # from remembering to forgetting
STYLES = {  # Okabe and Ito's colours, told apart by marker too
    OURS: ("#D55E00", "o"),
    "fla": ("#0072B2", "s"),
    "kda_hopper_cuda": ("#009E73", "^"),
    "kda_hopper": ("#56B4E9", "v"),
    "flash_kda": ("#CC79A7", "D"),
    "fla-gdn": ("#999999", "x"),
    FLOOR: ("#000000", ""),
}


def floor_by_shape(rows: Sequence[Row]) -> Figure | None:
    """Time over the memory floor, a line of dots for each case."""
    rows = [row for row in rows if row["impl"] != FLOOR]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not cases:
        return None
    figure = _figure(9, 1.3 + 0.3 * len(cases))
    axes = figure.add_subplot()
    for impl, of_impl in _by_impl(rows).items():
        color, marker = STYLES[impl]
        axes.plot(
            [row["us"] / row["floor_us"] for row in of_impl], [cases.index(row["case"]) for row in of_impl],
            marker, color=color, label=of_impl[0]["label"],
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel("GPU time / memory floor")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def time_by_tokens(rows: Sequence[Row]) -> Figure | None:
    single = [
        row for row in rows if row["N"] == 1 and row["gate"] == "prod" and row["suite"] not in ("decode", "serving")
    ]
    heads = [H for H in sorted({row["H"] for row in single}) if len({r["T"] for r in single if r["H"] == H}) > 1]
    panels = {f"one sequence, H = {H}": [row for row in single if row["H"] == H] for H in heads}
    figure = _panels(panels, "T", "tokens T")
    for axes in figure.axes if figure else ():
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    return figure


def time_by_heads(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if row["N"] == 1 and row["T"] == 8192 and row["gate"] == "prod"]
    return _panels({"one sequence, T = 8192": rows}, "H", "heads H") if len({row["H"] for row in rows}) > 1 else None


def time_by_gate(rows: Sequence[Row]) -> Figure | None:
    single = [row for row in rows if row["N"] == 1 and row["gate"] in GATES]
    panels = {}
    for T, H in sorted({(row["T"], row["H"]) for row in single if row["gate"] != "prod"}):
        of_shape = [row for row in single if (row["T"], row["H"]) == (T, H)]
        panels[f"T = {T}, H = {H}"] = [{**row, "at": GATES.index(row["gate"])} for row in of_shape]
    figure = _panels(panels, "at", "gate")
    for axes in figure.axes if figure else ():
        axes.set_xticks(range(len(GATES)), GATES)
        axes.grid(axis="x", visible=False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "floor": floor_by_shape,
    "tokens": time_by_tokens,
    "heads": time_by_heads,
    "gates": time_by_gate,
}


def drawable(rows: Iterable[Row]) -> list[Row]:
    """Rows with a GPU time, as `us`; of a case that two suites share the first."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["impl"] in STYLES and (us := time_us(row)) is not None:
            first.setdefault((row["case"], row["impl"]), {**row, "us": us})
    return list(first.values())


def _panels(panels: dict[str, list[Row]], x: str, label: str) -> Figure | None:
    """Time against row[x], a panel for each title, a line for each implementation, the floor dashed."""
    if not panels:
        return None
    figure = _figure(max(7.5, 4.7 * len(panels)), 4.4)
    lines = {}
    for i, (title, rows) in enumerate(panels.items()):
        axes: Axes = figure.add_subplot(1, len(panels), i + 1)
        for impl, of_impl in _by_impl(rows).items():
            color, marker = STYLES[impl]
            of_impl.sort(key=lambda row: row[x])
            (lines[of_impl[0]["label"]],) = axes.plot(
                [row[x] for row in of_impl], [row["us"] for row in of_impl], marker=marker, color=color,
                linestyle="--" if impl == FLOOR else "-",
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_xticks(sorted({row[x] for row in rows}))
        axes.set_yscale("log")
        _plain(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GPU time, us")
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _plain(axis: Axis) -> None:
    """1, 2, 5, 10 ... on a logarithmic axis, however few decades it has."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _by_impl(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {impl: [] for impl in STYLES}
    for row in rows:
        groups[row["impl"]].append(row)
    return {impl: group for impl, group in groups.items() if group}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(rows: Iterable[Row], out: Path) -> list[Path]:
    import matplotlib

    rows = drawable(rows)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is None:
            continue
        written.append(out / f"{name}.svg")
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same rows give the same file
            figure.savefig(written[-1], metadata={"Date": None})
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", nargs="+")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    for path in save(read(options.file), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
