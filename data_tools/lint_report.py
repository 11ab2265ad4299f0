"""The lint's findings as JSON and as one HTML page that needs nothing else: no script, no font, no network.

Texts of the data are escaped and shown with `dir="auto"`, so that right-to-left languages read as they should. Plots
are SVG inside the page: the AUC of each group with its interval, and how long the two sides are.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data_tools.lint_checks import Check
from data_tools.lint_classifier import Separation
from data_tools.lint_rows import PairRow

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:start;vertical-align:top;overflow-wrap:anywhere}th{background:#f5f5f5}h2{font-size:1.1rem}"
    ".high{color:#b00020;font-weight:600}.note{color:#666}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}"
    ".text{white-space:pre-wrap;background:#f7f7f7;padding:.5rem;max-height:22rem;overflow:auto;overflow-wrap:anywhere}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}th,.text{background:#262626}svg{background:#eee}}"
)
LEFT, WIDTH, RIGHT, LINE = 130, 480, 190, 24
"""Pixels of a plot: names, from 0.5 (or 0) to 1, numbers, height of a line."""
SHOWN_PAIRS = 3
SHOWN_TEXT = 1500
BINS = 24


class Found(Protocol):
    """What the command hands over (`data_tools.lint.Result`)."""

    path: str
    rows: Sequence[PairRow]
    checks: Sequence[Check]
    separations: Sequence[Separation]
    looked_at: Sequence[PairRow]
    sources: Sequence[Any]
    settings: dict[str, Any]


def report_of(found: Found, allowed: Sequence[str]) -> dict[str, Any]:
    """Every number, ready for JSON; shares and AUCs to 4 digits."""
    return {
        "pairs": len(found.rows),
        "looked_at": len(found.looked_at),
        "settings": found.settings,
        "refused": [check.name for check in found.checks if check.exceeds and check.name not in allowed],
        "checks": [
            {
                "name": check.name,
                "value": _round(check.value),
                "interval": None if check.interval is None else [_round(end) for end in check.interval],
                "limit": check.limit,
                "exceeds": check.exceeds,
                "allowed": check.name in allowed,
                "text": check.text,
                "ids": list(check.ids),
                **check.more,
            }
            for check in found.checks
        ],
        "surface": {own.group: _surface(own) for own in found.separations},
        "sources": [{name: _round(value) for name, value in row.items()} for row in found.sources],
    }


def page(found: Found, report: Mapping[str, Any]) -> str:
    """The whole page."""
    title = f"Lint of {html.escape(found.path)}"
    refused = ", ".join(report["refused"]) or "nothing"
    parts = [
        f"<h1>{title}</h1><p>{len(found.rows)} pairs; refused: {html.escape(refused)}.</p>",
        _checks_table(found, report),
        *_surface_part(found),
        *_verdict_part(found),
        *_sources_part(found),
        *_examples(found),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        + "\n".join(parts)
        + "</html>\n"
    )


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _surface(own: Separation) -> dict[str, Any]:
    return {
        "auc": _round(own.auc),
        "low": _round(own.low),
        "high": _round(own.high),
        "auc_texts": _round(own.auc_texts),
        "pairs": own.pairs,
        "prompts": own.prompts,
        "cues": [
            {
                "name": cue.name,
                "chosen_has_more": _round(cue.more),
                "chosen_has_less": _round(cue.less),
                "mean_chosen": _round(cue.chosen),
                "mean_rejected": _round(cue.rejected),
            }
            for cue in own.cues
        ],
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _said(text: object) -> str:
    """Text that may hold words of the data."""
    return f'<bdi dir="auto">{html.escape(str(text))}</bdi>'


def _checks_table(found: Found, report: Mapping[str, Any]) -> str:
    rows = []
    for check, own in zip(found.checks, report["checks"], strict=True):
        state = (
            "note" if check.limit is None else "ok" if not check.exceeds else "allowed" if own["allowed"] else "high"
        )
        ids = ", ".join(map(_said, check.ids))
        what = _said(check.text) + (f'<br><span class="note">{html.escape(check.remedy)}</span>' if check.found else "")
        rows.append([f'<span class="{state}">{state}</span>', html.escape(check.name), what, ids])
    return "<h2>Findings</h2>" + _table(["", "what", "found", "rows to look at"], rows)


def _surface_part(found: Found) -> list[str]:
    if not found.separations:
        return []
    rows = [
        [own.group, _said(cue.name), f"{cue.more:.0%}", f"{cue.less:.0%}", f"{cue.chosen:.3g}", f"{cue.rejected:.3g}"]
        for own in found.separations
        if own.group != "all"
        for cue in own.cues[:3]
    ]  # fmt: skip
    header = ["group", "feature", "chosen has more", "chosen has less", "mean of chosen", "mean of rejected"]
    return [
        "<h2>What surface features tell</h2><p>How often a classifier that sees only these features, and not these "
        "pairs, gives the chosen text the higher score. 0.5 is chance; the line is the 95% interval; dashed: the limit."
        "</p>",
        _forest(found.separations, float(found.settings["refuse_above"])),
        _table(header, rows),
        "<h2>Length</h2>",
        _lengths(found.looked_at),
    ]


def _forest(separations: Sequence[Separation], limit: float) -> str:
    height = LINE * len(separations) + 26

    def x(value: float) -> float:
        return LEFT + min(1.0, max(0.0, (value - 0.4) / 0.6)) * WIDTH

    parts = [f'<svg width="{LEFT + WIDTH + RIGHT}" height="{height}" role="img" font-size="13" fill="#222">']
    for mark, stroke in ((0.5, 'stroke="#999"'), (limit, 'stroke="#c33" stroke-dasharray="4 3"')):
        parts.append(f'<path d="M{x(mark):.1f} 0V{height - 20}" {stroke}/>')
        parts.append(f'<text x="{x(mark):.1f}" y="{height - 5}" text-anchor="middle">{mark:g}</text>')
    for number, own in enumerate(separations):
        y = LINE * number + 12
        colour = "#b00020" if own.auc > limit else "#2a6fb0"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{html.escape(own.group)}</text>'
            f'<path d="M{x(own.low):.1f} {y}H{x(own.high):.1f}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x(own.auc):.1f}" cy="{y}" r="4" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 10}" y="{y + 4}">{own.auc:.3f} [{own.low:.3f}, {own.high:.3f}]</text>'
        )
    return "".join(parts) + "</svg>"


def _lengths(rows: Sequence[PairRow]) -> str:
    """Two outlines over the same logarithmic bins: how many texts of each side have so many characters."""
    logs = [np.log10([max(1, len(getattr(row, side))) for row in rows]) for side in ("chosen", "rejected")]
    low, high = min(map(np.min, logs)), max(map(np.max, logs)) + 1e-6
    counts = [np.histogram(own, bins=BINS, range=(low, high))[0] for own in logs]
    top, tall, step = max(int(own.max()) for own in counts), 110, WIDTH / BINS
    parts = [f'<svg width="{LEFT + WIDTH + RIGHT}" height="{tall + 30}" role="img" font-size="13" fill="#222">']
    for own, colour, name, line in zip(counts, ("#2a6fb0", "#c77700"), ("chosen", "rejected"), (20, 40), strict=True):
        path = f"M{LEFT} {tall}"
        for number, count in enumerate(own.tolist()):
            path += f"V{tall - 100 * count / max(1, top):.1f}H{LEFT + (number + 1) * step:.1f}"
        parts.append(f'<path d="{path}V{tall}" fill="{colour}" fill-opacity="0.25" stroke="{colour}"/>')
        parts.append(f'<text x="{LEFT + WIDTH + 10}" y="{line}" fill="{colour}">{name}</text>')
    for at, value in ((LEFT, low), (LEFT + WIDTH, high)):
        parts.append(f'<text x="{at}" y="{tall + 18}" text-anchor="middle">{10**value:.0f}</text>')
    return "".join(parts) + f'<text x="{LEFT + WIDTH / 2}" y="{tall + 18}" text-anchor="middle">characters</text></svg>'


def _verdict_part(found: Found) -> list[str]:
    more = next((check.more for check in found.checks if check.name == "chosen_wrong"), None)
    if more is None:
        return []
    rows = [[html.escape(row["chosen"]), html.escape(row["rejected"]), str(row["pairs"])] for row in more["table"]]
    said = f"{more['by_rule']} sides had no verdict and were judged here by a rule." if more["by_rule"] else ""
    return [f"<h2>Verdicts</h2><p>{said}</p>", _table(["chosen", "rejected", "pairs"], rows)]


def _sources_part(found: Found) -> list[str]:
    header = [
        "source",
        "pairs",
        "share",
        "prompts",
        "characters chosen",
        "rejected",
        "chosen wrong",
        "rejected correct",
    ]
    header += ["not judged", "AUC of all features"]
    rows = []
    for row in found.sources:
        auc = "" if row["auc"] is None else f"{row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        cells = [_said(row["source"] or "(none)"), str(row["pairs"]), f"{row['share']:.1%}", str(row["prompts"])]
        cells += [f"{row['chosen_characters']:.0f}", f"{row['rejected_characters']:.0f}"]
        cells += [str(row[name]) for name in ("chosen_wrong", "rejected_correct", "unjudged")]
        rows.append([*cells, auc])
    return ["<h2>Sources</h2>", _table(header, rows)]


def _examples(found: Found) -> list[str]:
    """The pairs that the strongest group of features tells most clearly."""
    groups = [own for own in found.separations if own.group != "all"]
    if not groups:
        return []
    best = max(groups, key=lambda own: own.low)
    order = (-best.scores).argsort(kind="stable")[:SHOWN_PAIRS].tolist()
    parts = [f"<h2>Pairs that {html.escape(best.group)} tells most clearly</h2>"]
    for index in order:
        row = found.looked_at[index]
        parts.append(f"<h3>{_said(row.id)}</h3>{_text(row.prompt)}")
        sides = [f"<div><b>{side}</b>{_text(getattr(row, side))}</div>" for side in ("chosen", "rejected")]
        parts.append(f'<div class="pair">{"".join(sides)}</div>')
    return parts


def _text(text: str) -> str:
    short = text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 1]}…"
    return f'<div class="text" dir="auto">{html.escape(short)}</div>'
