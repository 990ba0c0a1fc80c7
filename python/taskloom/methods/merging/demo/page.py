"""The report: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
from html import escape
from itertools import pairwise
from pathlib import Path

from taskloom.methods.merging.demo import figures
from taskloom.methods.merging.demo.figures import LABELS
from taskloom.methods.merging.demo.results import DemoResults, Row

_STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --accent: #2f6f9f; --soft: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0 0 4px; font-size: 30px; letter-spacing: -0.01em; }
h2 { margin: 0 0 6px; font-size: 19px; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead { color: var(--muted); }
.note { color: var(--muted); font-size: 14px; }
section { margin-top: 20px; padding: 22px 24px; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 22px; }
.card { padding: 14px 18px; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card b { display: block; font-size: 27px; line-height: 1.25; color: var(--accent); font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--muted); font-size: 13.5px; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 600; }
tr.merge td:first-child { color: var(--accent); font-weight: 600; }
tr.divide td { border-top: 2px solid #cbd2d9; }
img { display: block; max-width: 100%; height: auto; margin: 8px 0; }
table.words th, table.words td { text-align: left; }
a { color: var(--accent); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.pair section { margin-top: 20px; }
code, pre { font: 13.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { background: var(--soft); padding: 1px 4px; border-radius: 4px; }
pre { margin: 0 0 12px; padding: 12px 14px; overflow-x: auto; background: var(--soft); border-radius: 8px; }
@media (max-width: 760px) { .cards, .pair { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; } }
"""


def _image(png: bytes, description: str, width: int) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description)}" width="{width}">'


def _card(value: str, text: str) -> str:
    return f'<div class="card"><b>{value}</b><span>{escape(text)}</span></div>'


def _cards(results: DemoResults) -> str:
    best = max(results.merges, key=lambda row: row.mean)
    restored = results.row("tall_restored")
    cards = [
        _card(f"{results.row('single-task').mean:.3f}", f"mean accuracy of {results.tasks} separate models"),
        _card(f"{best.mean:.3f}", f"best merge into one model: {LABELS[best.name]}"),
        _card(f"{restored.normalised:.1%}", "of single-task accuracy after TALL-mask compression"),
        _card(f"{results.compression.ratio:.1%}", "of the separate checkpoints' bytes for it"),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _seconds(row: Row) -> str:
    return "" if row.seconds is None else f"{row.seconds:.2f}"


def _table_row(row: Row, divide: bool) -> str:
    kind = " ".join(name for name, applies in (("merge", row.seconds is not None), ("divide", divide)) if applies)
    settings = ", ".join(f"{key} {value}" for key, value in (row.settings or {}).items())
    cells = [
        LABELS[row.name],
        *(f"{value:.3f}" for value in row.accuracy),
        f"<b>{row.mean:.3f}</b>",
        f"{row.normalised:.3f}",
        "" if row.alpha is None else f"{row.alpha:g}",
        _seconds(row),
        "" if row.bytes_written is None else f"{row.bytes_written / 1e6:.2f}",
    ]
    title = f' title="{escape(settings)}"' if settings else ""
    return f'<tr class="{kind}"{title}>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _table(results: DemoResults) -> str:
    heads = ["model", *(f"t{task}" for task in range(results.tasks)), "mean", "norm.", "&alpha;", "s", "MB"]
    kinds = [row.seconds is not None for row in results.rows]
    dividers = [False, *(before != after for before, after in pairwise(kinds))]
    body = "".join(_table_row(row, divide) for row, divide in zip(results.rows, dividers, strict=True))
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _settings_table(results: DemoResults) -> str:
    lines = []
    for row in results.merges:
        fixed = ", ".join(f"{key} {value}" for key, value in (row.settings or {}).items()) or "none"
        picked = "none" if row.alpha is None else f"{row.alpha:g}"
        cells = [f"<code>{row.name}</code>", fixed, picked, f'<a href="recipes/{row.name}.yml">recipes/{row.name}.yml</a>']
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th>merge_method</th><th>fixed settings</th><th>&alpha; by validation</th><th>recipe</th></tr>"
    return f'<div class="scroll"><table class="words"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _compression_text(results: DemoResults) -> str:
    found = results.compression
    kept = sum(found.kept) / len(found.kept)
    thresholds = ", ".join(f"{value:g}" for value in found.thresholds)
    return (
        f"The base, one multi-task vector and {results.tasks} bit masks take {found.stored_bytes / 1e6:.2f} MB against "
        f"{found.separate_bytes / 1e6:.2f} MB of separate checkpoints. A mask keeps {kept:.0%} of the entries on average; its threshold "
        f"(&lambda; = {thresholds} for tasks 0 to {results.tasks - 1}) was picked on validation data."
    )


def render_page(results: DemoResults) -> str:
    """The report as HTML, figures included."""
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in results.seconds.items())
    single = results.row("single-task").mean
    sampled = ", which samples entries above 8 tasks" if results.tasks > 8 else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Taskloom demo</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Many fine-tuned models, one merge</h1>
<p class="lead">Projected digits: {results.tasks} tasks, one pre-trained encoder of {results.parameters:,} parameters and
{results.tasks} fine-tuned ones, merged by <code>taskloom merge</code>. Seed {results.seed}.</p>
{_cards(results)}
<section>
<h2>How much accuracy survives a merge</h2>
<p>Every merged encoder is one set of weights that serves all tasks, each with its own frozen head. The dashed line is the mean of the
single-task models, {single:.3f}.</p>
{_image(figures.accuracy_bars(results), "bar chart of mean test accuracy of each model", 880)}
</section>
<section>
<h2>Task by task</h2>
{_table(results)}
<p class="note" style="margin-top:10px">norm. = mean over tasks of the accuracy divided by the single-task model's. s = wall time of the
command, start of the interpreter included. MB = size of the weights (of all {results.tasks} checkpoints for the single-task models; of
base, vector and masks for TALL restored).</p>
{_image(figures.task_heat_map(results), "heat map of test accuracy by model and task", 780)}
</section>
<section>
<h2>Storage</h2>
<p>{_compression_text(results)}</p>
{_image(figures.storage_bars(results), "bar chart of stored bytes", 880)}
</section>
<div class="pair">
<section>
<h2>Cosines of task vectors</h2>
<p class="note">From the merge's own report{sampled}. Near zero: the tasks move different weights.</p>
{_image(figures.cosine_matrix(results), "matrix of cosines between task vectors", 430)}
</section>
<section>
<h2>Selected entries</h2>
<p class="note">Share of each task vector that a merge selects, before signs are elected or masks vote.</p>
{_image(figures.kept_density(results), "share of entries selected by method and task", 430)}
</section>
</div>
<section>
<h2>Settings</h2>
<p>&alpha; is the recipe's <code>lambda</code>, the factor of the merged delta. It was picked on the <b>validation</b> splits from
{min(results.alphas):g} to {max(results.alphas):g} ({len(results.alphas)} values), the smallest of those that tie; every figure above is
of the test splits. The other settings are fixed.</p>
{_settings_table(results)}
<p class="note" style="margin-top:10px">One of them again, from this folder:</p>
<pre>taskloom merge recipes/ties.yml merged-again/</pre>
</section>
<section>
<h2>What this does not show</h2>
<p>A set-up of this size shows that the machinery works and how methods differ when task vectors interfere. It does not rank methods for
large models: which one comes first changes with seed, settings and number of tasks, and the fixed densities come from papers on far larger
models. Seconds here are mostly the start of a Python process; they say nothing about speed on real checkpoints.</p>
<p class="note">{escape(parts)}. {escape(versions)}.</p>
</section>
</main>
</body>
</html>
"""


def write_page(results: DemoResults, path: Path) -> None:
    """Write the report."""
    path.write_text(render_page(results), encoding="utf-8")
