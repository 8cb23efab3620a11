"""The figures and the page of an evaluation."""
import base64
import html
import io
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np
from PIL import Image

from .data.images import read_image
from .metrics import confusion_matrix, expected_calibration_error, format_metric

__all__ = ['draw_figures', 'write_page']

_WORST = 24
_NOTICE = 'For research. This is no medical device, and its answers are not for diagnosis.'


def draw_figures(
        labels: np.ndarray,
        probabilities: np.ndarray,
        calibrated: Optional[np.ndarray],
        classes: Sequence[str],
) -> Dict[str, bytes]:
    """Draw the confusion matrix, the ROC and precision-recall curves and the reliability diagram.

    Args:
        labels: (N,).
        probabilities: (N, num_classes).
        calibrated: Probabilities after temperature scaling, where there are some.
        classes: Names of the classes.

    Returns:
        PNG files by name.
    """
    from matplotlib.figure import Figure  # not pyplot, which would switch a notebook's backend
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

    figures: Dict[str, bytes] = {}

    def save(name: str, figure: Any) -> None:
        content = io.BytesIO()
        figure.savefig(content, dpi=100)
        figures[name] = content.getvalue()

    legible = len(classes) <= 40
    side = 3.6 + .25 * min(len(classes), 40)
    figure = Figure(figsize=(side, side), layout='constrained')
    ax = figure.subplots()
    ConfusionMatrixDisplay(confusion_matrix(labels, probabilities), display_labels=classes if legible else None).plot(
        ax=ax, cmap='Blues', colorbar=not legible, include_values=legible,
        xticks_rotation='vertical' if len(classes) > 3 else 'horizontal')
    if not legible:
        ax.set(xticks=[], yticks=[])
    ax.set_title('images')
    save('confusion.png', figure)

    shown = [i for i in range(len(classes)) if 0 < (labels == i).sum() < len(labels)][:10]
    for name, display, title in (('roc.png', RocCurveDisplay, 'ROC'), ('pr.png', PrecisionRecallDisplay, 'PR')):
        figure = Figure(figsize=(4.2, 4.2), layout='constrained')
        ax = figure.subplots()
        for i in shown:
            display.from_predictions(labels == i, probabilities[:, i], name=classes[i], ax=ax)
        ax.set(title=f'{title}, each class against the others')
        save(name, figure)

    figure = Figure(figsize=(4.2, 4.2), layout='constrained')
    ax = figure.subplots()
    ax.plot((0, 1), (0, 1), color='gray', lw=1)
    for label, p in (('as it is', probabilities), ('temperature from val/', calibrated)):
        if p is not None:
            right, confidence = calibration_curve(p.argmax(1) == labels, p.max(1).clip(0, 1), n_bins=10)
            ax.plot(confidence, right, 'o-', label=f'{label}: ECE {expected_calibration_error(labels, p):.3f}')
    ax.set(xlabel='confidence', ylabel='share that is right', title='reliability', xlim=(0, 1), ylim=(0, 1))
    ax.legend()
    save('reliability.png', figure)
    return figures


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; what is in the cells is HTML already."""
    head = ''.join(f'<th>{cell}</th>' for cell in header)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<table><tr>{head}</tr>{body}</table>'


def _embed(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


_PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ border: 1px solid #ccc; padding: 4px 9px; text-align: left }}
th {{ background: #f3f3f3 }}
.warning {{ background: #fff3cd; border-left: 5px solid #e0a800; padding: .5em 1em; margin: .5em 0 }}
</style></head><body>
{body}
</body></html>
'''


def write_page(
        file: Path,
        results: Dict[str, Any],
        figures: Dict[str, bytes],
        paths: Sequence[Path],
        labels: np.ndarray,
        probabilities: np.ndarray,
) -> None:
    """Write the page of an evaluation: one file that needs no network.

    Args:
        file: File to write.
        results: What metrics.json holds, of `timm_densese.evaluate.evaluate`.
        figures: What `draw_figures` drew.
        paths: Files of the images, (N,).
        labels: (N,).
        probabilities: (N, num_classes), as they are in `results`.
    """
    dataset, classes = results['dataset'], results['classes']
    names = [html.escape(name) for name in classes]
    groups = f', {dataset["groups"]} patients or groups' if dataset['groups'] else ''
    others = results.get('comparison', {})
    per_class = ('precision', 'recall', 'f1', 'specificity', 'auroc', 'auprc')
    body = [
        f'<h1>{html.escape(results["model"])}</h1>',
        f'<p>{html.escape(dataset["name"])}{", " + html.escape(dataset["split"]) if dataset["split"] else ""}: '
        f'{dataset["images"]} images{groups}. {_NOTICE}</p>',
        *(f'<div class="warning">{html.escape(warning)}</div>' for warning in results['warnings']),
        '<h2>Scores</h2>', f'<p>In brackets: {results["interval"] or "no interval"}.</p>',
        _table(('score', html.escape(results['model']), *map(html.escape, others)),
               [(name, format_metric(metric), *(format_metric(other.get(name)) for other in others.values()))
                for name, metric in results['metrics'].items()]),
        '<h2>By class</h2>',
        _table(('class', 'images', *per_class),
               [(names[i], str(int((labels == i).sum())),
                 *(format_metric(results['per_class'][name].get(score)) for score in per_class))
                for i, name in enumerate(classes)]),
    ]
    if 'paired' in results:
        paired = results['paired']
        mcnemar = paired['mcnemar']
        body += [
            f'<h2>Against {html.escape(paired["with"])}</h2>',
            f'<p>Only this model is right on {mcnemar["right_model_only"]} images, only the other on '
            f'{mcnemar["right_baseline_only"]}: McNemar\'s exact test gives p = {mcnemar["p"]:.3f}. It takes images as '
            f'independent, which those of one patient are not; the intervals below do not.</p>',
            _table(('score', 'difference'), [(k, format_metric(v)) for k, v in paired['differences'].items()])]
    body += ['<h2>Figures</h2>', ''.join(_embed(content, 'png', name) for name, content in figures.items())]
    if results['temperature'] is not None:
        body.append(f'<p>Temperature, fitted on val/: {results["temperature"]:.3f}. '
                    f'<code>timm-densese predict --calibration metrics.json</code> uses it.</p>')

    sure = probabilities.max(1)
    wrong = [i for i in np.argsort(-sure, kind='stable') if probabilities[i].argmax() != labels[i]][:_WORST]
    body += [f'<h2>Worst errors</h2><p>The {len(wrong)} that were most sure of something else.</p>',
             _table(('image', 'file', 'is', 'called', 'with'), [
                 (_embed(_thumbnail(paths[i]), 'jpeg', paths[i].name),
                  html.escape(results['predictions'][i]['file']), names[labels[i]],
                  names[probabilities[i].argmax()], f'{sure[i]:.1%}') for i in wrong])]
    if results['unreadable']:
        body += ['<h2>Not readable</h2>', _table(('file', 'reason'), [
            (html.escape(file), html.escape(reason)) for file, reason in results['unreadable'].items()])]
    title = html.escape(f'{results["model"]} on {dataset["name"]}')
    file.write_text(_PAGE.format(title=title, body='\n'.join(body)), encoding='utf-8',
                    errors='backslashreplace')


def _thumbnail(path: Path) -> bytes:
    image = read_image(path)
    image.thumbnail((128, 128), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, 'jpeg', quality=85)
    return content.getvalue()
