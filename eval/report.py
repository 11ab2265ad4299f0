"""A run's report as JSON, as Markdown and as one HTML page that needs nothing else: no script, no font, no network.

All three hold the same numbers; the tables are made once. Bars are SVG inside the page.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.run_folder import write_file

Cells = Sequence[str]
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top;overflow-wrap:anywhere}th{background:#f5f5f5}h2{font-size:1.1rem}"
)
BAR, LEFT, RIGHT, LINE = 420, 220, 120, 24
"""Pixels: a bar of 1.0, room for names, room for numbers, height of a line."""
MOST_BARS = 100


@dataclass(frozen=True)
class Table:
    """One table of the report; header and rows of the same width."""

    title: str
    header: Cells
    rows: Sequence[Cells]


def write_report(folder: str | Path, report: Mapping[str, Any]) -> None:
    """report.json, report.md and report.html in `folder`, each by rename. Raises RunError."""
    write_file(Path(folder) / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(Path(folder) / "report.md", markdown(report))
    write_file(Path(folder) / "report.html", page(report))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {_escaped(report['task'])}", "", _escaped(headline(report)), ""]
    for table in tables(report):
        lines += [f"## {table.title}", "", *markdown_table(table), ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> list[str]:
    """Lines of a Markdown table."""
    cells = [table.header, ["---"] * len(table.header), *table.rows]
    return [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in cells]


def page(report: Mapping[str, Any]) -> str:
    """The report as a whole HTML page."""
    parts = [f"<h1>{html.escape(report['task'])}</h1><p>{html.escape(headline(report))}</p>", bars(report)]
    for table in tables(report):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
        )
        parts.append(f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>")
    title = html.escape(report["task"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        + "\n".join(parts)
        + "</html>\n"
    )


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: the number, its interval and what it is over."""
    result = report["result"]
    micro = result["micro"]
    text = f"{result['metric']} {_ranged(micro)} over {result['items']} items"
    if outcomes := result.get("outcomes"):
        text += ": " + ", ".join(f"{count} {name}" for name, count in outcomes.items() if count or name != "abstained")
    return f"{text}. 95% intervals in brackets."


def bars(report: Mapping[str, Any]) -> str:
    """A bar for all items and one a subject, with the interval as a line, as inline SVG."""
    result = report["result"]
    shown = [("all items", result["micro"])]
    if len(result["subjects"]) > 1:
        shown += [(name, own) for name, own in result["subjects"].items()][:MOST_BARS]
    top = max([own["high"] for _, own in shown]) if result["metric"].startswith("nats") else 1.0
    scale, height = BAR / max(top, 1e-9), LINE * len(shown) + 8
    parts = [f'<svg width="{LEFT + BAR + RIGHT}" height="{height}" role="img" font-size="13" fill="#222">']
    for number, (name, own) in enumerate(shown):
        y = 4 + LINE * number
        short = name if len(name) <= 30 else f"{name[:29]}…"
        low, high = LEFT + own["low"] * scale, LEFT + own["high"] * scale
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{html.escape(short)}</text>'
            f'<rect x="{LEFT}" y="{y + 4}" width="{max(0.0, own["value"]) * scale:.1f}" height="{LINE - 8}"'
            f' fill="#7aa6d8"/>'
            f'<path d="M{low:.1f} {y + 12}H{high:.1f}M{low:.1f} {y + 8}v8M{high:.1f} {y + 8}v8" stroke="#222"/>'
            f'<text x="{LEFT + BAR + 8}" y="{y + 16}">{own["value"]:.3f}</text>'
        )
    if "chance" in result:
        x = LEFT + result["chance"] * scale
        parts.append(f'<path d="M{x:.1f} 0V{height}" stroke="#c33" stroke-dasharray="4 3"><title>chance</title></path>')
    return "".join(parts) + "</svg>"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables of a report, in the order in which they are read."""
    result = report["result"]
    found = [Table("Result", ("what", "value"), _result_rows(result))]
    if len(result["subjects"]) > 1:
        found.append(Table("By subject", *_subjects(result)))
    if report.get("comparison"):
        found.append(comparison_table(report["comparison"]))
    found.append(Table("Baseline", ("what", "value"), [("same budget", report["baseline"])]))
    found.append(Table("Settings", ("what", "value"), _flat(report["settings"])))
    found.append(Table("Digests", ("of", "value"), _flat(report["digests"])))
    return found


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Differences B - A in all and by subject (`eval.compare`)."""
    rows = [_compared("all items", found)] + [_compared(name, own) for name, own in found["subjects"].items()]
    title = f"Comparison, B - A{' in ' + found['unit'] if 'unit' in found else ''}"
    return Table(title, ("subject", "items", "A", "B", "B - A [95%]", "only A", "only B", "McNemar p"), rows)


def _compared(name: str, own: Mapping[str, Any]) -> Cells:
    test = own.get("mcnemar")
    counts = (str(test["only_a"]), str(test["only_b"]), f"{test['p']:.4f}") if test else ("", "", "")
    difference = own["difference"]
    signed = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return (name, str(own["items"]), f"{own['a']:.3f}", f"{own['b']:.3f}", signed, *counts)


def _result_rows(result: Mapping[str, Any]) -> list[Cells]:
    rows: list[Cells] = [(f"{result['metric']}, micro (every item weighs the same)", _ranged(result["micro"]))]
    if macro := result["macro"]:
        rows.append((f"macro (every one of {macro['subjects']} subjects weighs the same)", _ranged(macro)))
    if "chance" in result:
        rows.append(("by chance", f"{result['chance']:.3f}"))
    rows += [(f"items {name}", str(count)) for name, count in (result.get("outcomes") or {}).items()]
    if "answered" in result:
        own = result["answered"]
        said = "none" if own["value"] is None else _ranged(own)
        rows.append((f"over the {own['items']} items with an answer", said))
    if "negative_marking" in result:
        own = result["negative_marking"]
        rows.append((f"negative marking, a wrong answer costs {own['penalty']}", f"{own['value']:.3f}"))
    if "verifier" in result:
        own = result["verifier"]
        rows.append((f"{result['metric']} of the vote alone", _ranged(own["vote_alone"])))
        rows.append(("items that the verifier was asked about, and decided", f"{own['asked']}, {own['decided']}"))
    if "best_of_n" in result:
        rows.append((f"best of {result['samples']['n']} by reward", _ranged(result["best_of_n"])))
    for name, own in result.get("prm", {}).items():
        title = {"best_of_n": "best of n", "weighted_vote": "vote weighted"}[name]
        rows.append((f"{title} by process rewards, over {result['samples']['n']} samples", _ranged(own)))
        rows.append((f"{title} by process rewards - {result['metric']}", _ranged(own["over_vote"])))
    if "audit" in result:
        own = result["audit"]
        rows.append(("judged samples in audit.jsonl, checked by a person", f"{own['rows']}, {own['checked']}"))
        if result["judge_unreadable"]:
            rows.append(("invalid because the judge wrote no verdict", str(result["judge_unreadable"])))
        if own["checked"]:
            rows.append(("person and judge agree", f"{_ranged(own['agreement'])}, kappa {own['kappa']:.3f}"))
    rows += [(f"by rule {rule}", _ranged(own)) for rule, own in result.get("rules", {}).items()]
    rows += [(f"pass@{k}", _ranged(own)) for k, own in result.get("pass_at_k", {}).items()]
    if "margin_nats" in result:
        rows.append(("margin chosen - rejected, nats", _ranged(result["margin_nats"])))
    if "samples" in result:
        rows += _sample_rows(result["samples"])
    for name in ("perplexity", "nats_per_byte"):
        if name in result:
            rows.append((name.replace("_per_", " a "), _ranged(result[name])))
    return rows + [(name, f"{result[name]:.0f}") for name in ("tokens", "bytes") if name in result]


def _sample_rows(own: Mapping[str, Any]) -> list[Cells]:
    spread = "" if own["accuracy_sd"] is None else f" +- {own['accuracy_sd']:.3f} (sd over sample numbers)"
    tokens = "not known" if own["tokens"] is None else str(own["tokens"])
    return [
        ("a single sample is right", f"{own['accuracy_mean']:.3f}{spread}"),
        ("samples an item", str(own["n"])),
        *((f"samples {name}", str(count)) for name, count in own["verdicts"].items()),
        ("samples cut at max_tokens", str(own["cut"])),
        ("tokens drawn", tokens),
    ]


def _subjects(result: Mapping[str, Any]) -> tuple[Cells, list[Cells]]:
    names: list[str] = list(result["outcomes"]) if result.get("outcomes") else []
    header = ("subject", "items", result["metric"], *names)
    rows = [
        (subject, str(own["items"]), _ranged(own), *(str(own["outcomes"][name]) for name in names))
        for subject, own in result["subjects"].items()
    ]
    return header, rows


def _ranged(own: Mapping[str, Any]) -> str:
    if own["low"] is None:
        return f"{own['value']:.3f}"
    return f"{own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}]"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[Cells]:
    rows: list[Cells] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _escaped(text: str) -> str:
    """For a cell of a Markdown table: one line, no markup of the data's own."""
    for char in "\\|<>`*":
        text = text.replace(char, f"\\{char}")
    return text.replace("\r", " ").replace("\n", " ⏎ ")
