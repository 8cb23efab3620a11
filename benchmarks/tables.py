"""Rows of throughput.py as CSVs with timm's columns, as tables, as figures, and as the table that the docs quote."""
import csv
import io
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

from common import base
from matplotlib.figure import Figure

from timm_densese.files import replace_file

KEY = ('kind', 'execution', 'dtype', 'img_size', 'batch', 'model')
DOCS = [Path(__file__).parents[1] / name for name in ('README.md', 'docs/performance.md')]
# What the docs quote: kind, the model, its batch sizes.
QUOTED = (('infer', 'se_densenet{} fused', (1, 4, 16)), ('train', 'se_densenet{} linear memory', (1, 4, 8, 16)))
# And how it ran. README.md has the first.
RAN = {'eager': '', 'compile': ', compiled', 'freezing': ', compiled with freezing',
       'onnxruntime': ', in ONNX Runtime', 'openvino': ', in OpenVINO'}
SHOWN = {'float32': 'float32', 'bfloat16': 'bfloat16', 'amp_bfloat16': 'bfloat16 autocast'}
MARKS = re.compile(r'(<!-- throughput -->\n)(.*?)(\n<!-- /throughput -->)', re.DOTALL)


def read(out: Path) -> list[dict[str, Any]]:
    """The newest row of each kind, execution, type, size, batch and model."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    file = out / 'rows.jsonl'
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        rows[tuple(row[key] for key in KEY)] = row
    return list(rows.values())


def quoted_table(rows: list[dict[str, Any]], file: Path) -> str:
    """The table that a page quotes, in Markdown: 224x224, against timm's DenseNet of the same depth, run as the row is.

    docs/ has every depth that was measured, exported too, and how the rounds differ, README.md the medians of depth
    121, eager.
    """
    short = file.name == 'README.md'
    rows = [row for row in rows if not short or base(row['model']) == 'densenet121']
    if not rows:
        return 'Not measured since the code changed: `python benchmarks/throughput.py --quote` writes the table here.'
    found = {tuple(row[key] for key in KEY): row for row in rows if row.get('faster_than_densenet')}
    batches = sorted({size for _, _, sizes in QUOTED for size in sizes})
    lines = ['| | ' + ' | '.join(f'batch {size}' for size in batches) + ' |', '|' + '---|' * (1 + len(batches))]
    for kind, name, _ in QUOTED:
        for model in sorted({row['model'] for row in rows if base(row['model']) in row['model']
                             and row['model'] == name.format(base(row['model'])[8:])}):
            for execution, dtype in product(list(RAN)[:1 if short else None], SHOWN):
                cells = [_quoted(found.get((kind, execution, dtype, 224, size, model)), short) for size in batches]
                if any(cells):
                    lines.append('| ' + ' | '.join([f'{model}, {SHOWN[dtype]}{RAN[execution]}', *cells]) + ' |')
    first = rows[0]
    return '\n'.join([*lines, '', f'{first["device"]}, {first["threads"]} threads, torch {first["torch"]}, timm '
                      f'{first["timm"]}; ' + ('medians.' if short else 'in brackets, the middle half of the rounds.')])


def _quoted(row: dict[str, Any] | None, short: bool) -> str:
    if row is None:
        return ''
    faster = row['faster_than_densenet']
    return f'{faster["p50"]:.2f}x' if short else f'{faster["p50"]:.2f}x ({faster["p25"]:.2f} to {faster["p75"]:.2f})'


def quote(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the table between a file's marks, where it has them."""
    text = file.read_text()
    new = MARKS.sub(lambda marks: marks[1] + quoted_table(rows, file) + marks[3], text)
    if new != text:
        replace_file(file, new)


def write_tables(rows: list[dict[str, Any]], out: Path) -> None:
    """Write a CSV for each kind, type and execution, named and with the columns as timm's are."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if 'error' not in row:
            groups.setdefault((row['kind'], row['dtype'], row['execution']), []).append(row)
    for (kind, dtype, execution), group in groups.items():
        columns = ['img_size', 'samples_per_sec', 'step_time', 'batch_size']
        fields = ['model', *(f'{kind}_{column}' for column in columns), 'param_count']
        if kind == 'infer':
            fields += ['infer_gmacs', 'infer_macts']
        text = io.StringIO()
        table = csv.DictWriter(text, fields, extrasaction='ignore', lineterminator='\n')
        table.writeheader()
        for row in sorted(group, key=lambda row: -row['samples_per_sec']):
            table.writerow({'model': row['model'], f'{kind}_img_size': row['img_size'],
                            f'{kind}_samples_per_sec': round(row['samples_per_sec'], 2),
                            f'{kind}_step_time': round(row['step_time_ms'], 3),
                            f'{kind}_batch_size': row['batch_size'], 'param_count': row['param_count'],
                            'infer_gmacs': row['gmacs'], 'infer_macts': row['macts']})
        version = group[0]['torch'].split('+')[0].replace('.', '')
        replace_file(out / f'benchmark-{kind}-{dtype}-nhwc-pt{version}-{execution}.csv', text.getvalue())


def write_summary(rows: list[dict[str, Any]], out: Path) -> None:
    """Write README.md: a table for each kind, execution, type and size, with what failed."""
    first = rows[0]
    driver = f', driver {first["driver"]}' if first['driver'] else ''
    text = [
        f'# {first["device"]}',
        f'torch {first["torch"]}, timm {first["timm"]}{driver}, {first["threads"]} threads. Images a second, medians; '
        'in brackets, against the densenet of the same depth in the same rounds (more is faster), with the middle half '
        'of the rounds. Latency of one image; peak memory beyond what the process used before, weights included. On a '
        'CPU that is resident memory, in a process of its own for each row. Rounds and commit are in rows.jsonl.']
    for kind, execution, dtype, size in dict.fromkeys(
            (row['kind'], row['execution'], row['dtype'], row['img_size']) for row in rows):
        group = [row for row in rows if (row['kind'], row['execution'], row['dtype'], row['img_size'])
                 == (kind, execution, dtype, size)]
        batches = sorted({row['batch'] for row in group}, key=lambda batch: (batch == 'largest', batch))
        has_latency = any('latency_ms' in row for row in group)
        header = ['model', *(f'batch {batch}' if batch != 'largest' else 'largest batch' for batch in batches)]
        header += ['latency, ms (p99)'] if has_latency else []
        lines = ['| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header)]
        for model in dict.fromkeys(row['model'] for row in group):
            own = {row['batch']: row for row in group if row['model'] == model}
            cells = [model, *(_cell(own.get(batch)) for batch in batches)]
            if has_latency:
                latency = own.get(1, {}).get('latency_ms')
                cells.append(f'{latency["p50"]:.1f} ({latency["p99"]:.1f})' if latency else '')
            lines.append('| ' + ' | '.join(cells) + ' |')
        what = 'Inference' if kind == 'infer' else 'Training step'
        text += [f'## {what}, {execution}, {dtype}, {size}x{size}', '\n'.join(lines),
                 '\n'.join(f'`{command}`  ' for command in dict.fromkeys(row['command'] for row in group)).rstrip()]
    text += [f'![{file.stem}]({file.name})' for file in sorted(out.glob('*.png'))]
    replace_file(out / 'README.md', '\n\n'.join(text) + '\n')


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ''
    if 'error' in row:
        return row['error'].replace('|', '/')
    relative = None if row['batch'] == 'largest' else row['faster_than_densenet']  # each at a batch size of its own
    shown = f' ({relative["p50"]:.2f}x, {relative["p25"]:.2f} to {relative["p75"]:.2f})' if relative else ''
    memory = f', {row["peak_memory_mb"]:.0f} MB' if row['peak_memory_mb'] else ''
    size = f'{row["batch_size"]}: ' if row['batch'] == 'largest' else ''
    return f'{size}{row["samples_per_sec"]:.1f}{shown}{memory}'


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw throughput against batch size and against memory, a panel for each depth, and what SE costs."""
    good = [row for row in rows if 'error' not in row]
    for kind in ('infer', 'train'):
        lines: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
        for row in good:
            if row['kind'] == kind:
                depth, label = base(row['model'])[8:], row['model'].replace(base(row['model']), 'densenet')
                lines.setdefault((depth, row['execution'], row['dtype']), {}).setdefault(label, []).append(row)
        panels = sorted(lines)
        labels = list(dict.fromkeys(label for panel in lines.values() for label in panel))
        for x, title in (('batch_size', 'batch size'), ('peak_memory_mb', 'peak memory, MB')):
            if not panels or not any(row[x] for row in good):
                continue
            columns = min(4, len(panels))
            height = -(-len(panels) // columns)
            fig = Figure(figsize=(3.2 * columns + 2.4, 2.8 * height), layout='constrained')
            axes = fig.subplots(height, columns, squeeze=False)
            for ax, panel in zip(axes.flat, panels, strict=False):
                for i, label in enumerate(labels):
                    line = sorted((row[x], row['samples_per_sec']) for row in lines[panel].get(label, []) if row[x])
                    ax.plot(*zip(*line, strict=True) if line else ((), ()), 'o-', ms=3, color=f'C{i}')
                ax.set(title=', '.join(panel), xlabel=title, ylabel='images/s', ylim=(0, 1.1 * ax.dataLim.y1))
                ax.set_xscale('log', base=2)
                ax.xaxis.set_major_formatter('{x:g}')
            for ax in axes.flat[len(panels):]:
                ax.set_axis_off()
            fig.legend(axes.flat[0].lines, labels, loc='outside right upper', fontsize=7)
            _save_figure(fig, out / f'{kind}-{"batch" if x == "batch_size" else "memory"}.png')
    costs = [(f'{row["kind"]}, {row["execution"]}, {row["dtype"]}, batch {row["batch"]}, {base(row["model"])[8:]}',
              100 / row['faster_than_densenet']['p50'] - 100) for row in good
             if row['model'].startswith('se_') and ' ' not in row['model'] and row['faster_than_densenet']
             and row['batch'] != 'largest']
    if costs:
        fig = Figure(figsize=(7, 1 + .17 * len(costs)), layout='constrained')
        ax = fig.subplots()
        ax.barh(range(len(costs)), [value for _, value in costs])
        ax.set(yticks=range(len(costs)), xlabel="%, more time than timm's densenet of the same depth",
               title='cost of SE')
        ax.set_yticklabels([label for label, _ in costs], fontsize=7)
        ax.margins(y=.01)
        ax.invert_yaxis()
        _save_figure(fig, out / 'se-cost.png')


def _save_figure(fig: Any, file: Path) -> None:
    content = io.BytesIO()
    fig.savefig(content, dpi=110)
    replace_file(file, content.getvalue())


