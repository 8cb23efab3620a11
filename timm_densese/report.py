"""The pages of an evaluation and an explanation: one file each, without scripts, that needs no network."""
import base64
import html
import io
import math
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from .data.images import read_image
from .figures import lettering_note
from .metrics import format_metric

__all__ = [
    'FONTS', 'STYLE', 'Overlay', 'embed', 'fold', 'head_of_scores', 'in_words', 'scale_of_scores', 'subgroup_sections',
    'table', 'threshold_section', 'write_explanation', 'write_html', 'write_page',
]

_WORST = 24
_OVERLAYS, _OVERLAYS_OF_A_CLASS = 120, 12
_LONG_TABLE = 30
_NOTICE = 'For research. This is no medical device, and its answers are not for diagnosis.'

# Each score's name and meaning in words. {guess} is what answers by chance attain, {log} its log loss.
_SCORES = {
    'accuracy': ('accuracy', 'share of the images called right'),
    'balanced_accuracy': (
        'balanced accuracy', 'share called right in each class, averaged, so that rare classes count as much; guessing '
        'gives {guess:.2f}'),
    'auroc': (
        'area under the ROC curve', 'how often an image of a class gets more of its probability than an image of '
        'another; guessing gives 0.50'),
    'auprc': (
        'average precision', 'how pure the images are that are ranked highest for a class; guessing gives {guess:.2f}'),
    'nll': ('log loss', 'minus the logarithm of the right class\'s probability; 0 is best, guessing gives {log:.2f}'),
    'brier': ('Brier score', 'squared distance of the probabilities from the truth; 0 is best, 2 is worst'),
    'ece': (
        'calibration error', 'distance of the confidence from the share that is right; 0 is best. Resampling adds to '
        'it, so that its interval lies high'),
}
_CLASS_SCORES = {
    'precision': 'precision', 'recall': 'recall (sensitivity)', 'f1': 'F1', 'specificity': 'specificity',
    'auroc': 'area under ROC', 'auprc': 'average precision'}
_CALIBRATED = '_calibrated'
_POINT = {
    'sensitivity': ('sensitivity', 'share of the positive images that are not called negative'),
    'specificity': ('specificity', 'share of the others that are not called positive'),
    'ppv': ('positive predictive value', 'share of those called positive that are'),
    'npv': ('negative predictive value', 'share of those called negative that are'),
    'ppv_at_prevalence': ('positive predictive value', 'the same, at the prevalence given'),
    'npv_at_prevalence': ('negative predictive value', 'the same, at the prevalence given'),
    'not_sure': ('not sure', 'share of the images between the two thresholds'),
}
_CAPTIONS = {
    'confusion.png': 'Which class is called what', 'roc.png': 'ROC curves', 'pr.png': 'Precision and recall',
    'reliability.png': 'Confidence, and how often it is right'}


# The frame of every page. The colours are those that gradio calls slate, blue and amber, for `serve` to share.


FONTS = ('system-ui', 'Segoe UI', 'Roboto', 'Noto Sans', 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei',
         'sans-serif')
STYLE = '''
.warning { background: #fef3c7; color: #1e293b; border-left: 5px solid #d97706; padding: .5em 1em; margin: .5em 0 }
.page { font: 16px/1.5 FONTS; color: #1e293b; background: #fff; max-width: 1100px; margin: 0 auto;
  padding: 1em; overflow-wrap: anywhere }
.page h1 { font-size: 1.5em; line-height: 1.3; margin: .6em 0 }
.page h2 { font-size: 1.2em; margin: 1.6em 0 .4em }
.page h3 { font-size: 1em; margin: 1em 0 .3em }
.page small, .page figcaption { font-size: .85em; color: #475569 }
.page a { color: #2563eb }
.page img { max-width: 100%; height: auto }
.page figure { margin: 0 }
.page summary { font-size: 1.2em; font-weight: bold; cursor: pointer; margin: 1em 0 .4em }
.page .wide { overflow-x: auto }
.page table { border-collapse: collapse; font-size: .9em; overflow-wrap: normal }
.page th, .page td { border: 1px solid #cbd5e1; padding: 4px 9px; text-align: left }
.page th { background: #f1f5f9 }
.page .figures { display: flex; flex-wrap: wrap; gap: 1em; align-items: end }
.page .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1em }
.page .pairs img { width: 100% }
.page .pairs { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)) }
.page .score { display: grid; grid-template-columns: 1fr 1fr; gap: .2em 1.5em; padding: .5em 0;
  border-top: 1px solid #cbd5e1; break-inside: avoid }
.page .score small { display: block }
.page .scale { position: relative; min-height: 1.5em; align-self: center; margin: 0 12px;
  background: repeating-linear-gradient(90deg, #cbd5e1 0 1px, transparent 1px calc(25% - .25px)) }
.page .scale span, .page .scale i { position: absolute }
.page .scale span { transform: translateX(-50%); font-size: .85em }
.page .interval { height: 4px; top: calc(50% - 2px); background: #93c5fd }
.page .point { width: 12px; height: 12px; border-radius: 50%; top: calc(50% - 6px); margin-left: -6px;
  background: #2563eb }
.page .other .interval { background: #cbd5e1 }
.page .other .point { background: #64748b }
.page .beyond { right: -14px; top: 0; font-style: normal; font-weight: bold }
@media (max-width: 700px) { .page .score { grid-template-columns: 1fr } .page h1 { font-size: 1.25em } }
@media print {
  @page { margin: 15mm }
  .page, .warning { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .page { font-size: 11px; max-width: none; padding: 0 }
  .page .wide { overflow: visible }
  .page .figures figure:not(:first-child) { max-width: 48% }
  .page figure, .page tr, .page .warning { break-inside: avoid }
  .page h2, .page h3, .page summary { break-after: avoid }
  .page details::details-content { content-visibility: visible; block-size: auto }
}
'''.replace('FONTS', ', '.join(f'"{font}"' if ' ' in font else font for font in FONTS))


def write_html(file: Path, title: str, warnings: Sequence[str], sentence: str, body: Sequence[str]) -> None:
    """Write a page: warnings above all else, then one sentence that says what a reader came for."""
    page = '\n'.join([
        '<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head><body class="page">',
        *(f'<div class="warning" role="note">{html.escape(warning)}</div>' for warning in warnings),
        f'<h1>{html.escape(sentence)}</h1>', *filter(None, body), '</body></html>', ''])
    file.write_text(page, encoding='utf-8', errors='backslashreplace')  # a file's name may be no text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; what is in the cells is HTML already."""
    head = ''.join(f'<th>{cell}</th>' for cell in header)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def fold(title: str, content: str, rows: int = 0) -> str:
    """A part of the page that folds; a long one is closed at first. On paper it is open."""
    is_open = ' open' if rows <= _LONG_TABLE else ''
    return f'<details{is_open}><summary>{html.escape(title)}</summary>{content}</details>'


def embed(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _thumbnail(image: Image.Image, side: int) -> bytes:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.convert('RGB').save(content, 'jpeg', quality=85)
    return content.getvalue()


# The page of an evaluation.


def in_words(name: str, classes: int = 2) -> Tuple[str, str]:
    """A score's name in words, and what it means."""
    title, meaning = _SCORES[name.removesuffix(_CALIBRATED)]
    title += ', with temperature' if name.endswith(_CALIBRATED) else ''
    return title, meaning.format(guess=1 / classes, log=math.log(classes))


def scale_of_scores(metric: Dict[str, Any], kind: str = '') -> str:
    """A score as a point with its interval, on a scale from 0 to 1; an arrow says that it goes on beyond."""
    low, high = metric.get('low', metric['value']), metric.get('high', metric['value'])
    left, point, right = (100 * min(max(x, 0.), 1.) for x in (low, metric['value'], high))
    return (f'<div class="scale {kind}"><i class="interval" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
            f'<i class="point" style="left:{point:.1f}%"></i>'
            + ('<i class="beyond">→</i>' if high > 1 else '') + '</div>')


def head_of_scores(interval: str) -> str:
    """The row above scores that are drawn: what points and lines are, and the scale."""
    ticks = ''.join(f'<span style="left:{100 * x:.0f}%">{x:g}</span>' for x in (0, .25, .5, .75, 1))
    return (f'<div class="score"><small>Points are scores, lines their intervals: {interval or "none"}. An arrow: it '
            f'goes on beyond 1.</small><div class="scale">{ticks}</div></div>')


def _scores(results: Dict[str, Any], classes: int) -> List[str]:
    """Each score as a point on one scale: the model's, and below it those of what it is compared with."""
    rows = [head_of_scores(results['interval'])]
    for name, metric in results['metrics'].items():
        title, meaning = in_words(name, classes)
        row = [f'<div><b>{title}</b>: {format_metric(metric)}<small>{meaning}</small></div>', scale_of_scores(metric)]
        for other, metrics in results.get('comparison', {}).items():
            if name in metrics:
                row += [f'<small>{html.escape(other)}: {format_metric(metrics[name])}</small>',
                        scale_of_scores(metrics[name], 'other')]
        rows.append(f'<div class="score">{"".join(row)}</div>')
    return rows


def write_page(
        file: Path,
        results: Dict[str, Any],
        figures: Dict[str, bytes],
        paths: Sequence[Path],
        labels: np.ndarray,
        probabilities: np.ndarray,
) -> None:
    """Write the page of an evaluation.

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
    others = results.get('comparison', {})
    best = results['metrics']['balanced_accuracy']
    interval = f'95% interval {best["low"]:.3f} to {best["high"]:.3f}' if 'low' in best else (
        f'interval {best.get("interval", "not computed")}')
    patients = f' of {dataset["groups"]} patients or groups.' if dataset['groups'] else (
        ' (of how many patients is not known).')
    sentence = (f'{results["model"]} has a balanced accuracy of {best["value"]:.3f} ({interval}) on '
                f'{dataset["images"]} images{patients}')
    where = dataset['name'] + (f', {dataset["split"]}' if dataset['split'] else '')
    body = [
        f'<p>Measured on {html.escape(where)}. {_NOTICE}</p>',
        '<h2>Scores</h2>', *_scores(results, len(np.unique(labels))),
        '<h2>Figures</h2><div class="figures">',
        *(f'<figure>{embed(content, "png", _CAPTIONS[name])}<figcaption>{_CAPTIONS[name]}</figcaption></figure>'
          for name, content in figures.items()), '</div>',
        lettering_note(classes),
    ]
    if results['temperature'] is not None:
        body.append(f'<p>Temperature, fitted on val/: {results["temperature"]:.3f}. '
                    f'<code>timm-densese predict --calibration metrics.json</code> uses it.</p>')
    body.append(fold('Scores in numbers', table(
        ('score', html.escape(results['model']), *map(html.escape, others)),
        [(in_words(name)[0], format_metric(metric), *(format_metric(other.get(name)) for other in others.values()))
         for name, metric in results['metrics'].items()])))
    body.append(fold('By class', (
        '<p>Precision: of the images called this class, the share that is. Recall: of its images, the share found. F1: '
        'their harmonic mean. Specificity: of the other images, the share not called it.</p>'
        + table(('class', 'images', *_CLASS_SCORES.values()),
                 [(names[i], str(int((labels == i).sum())),
                   *(format_metric(results['per_class'][name].get(score)) for score in _CLASS_SCORES))
                  for i, name in enumerate(classes)])), len(classes)))
    if 'paired' in results:
        paired = results['paired']
        mcnemar = paired['mcnemar']
        body.append(fold(f'Against {paired["with"]}', (
            f'<p>Only this model is right on {mcnemar["right_model_only"]} images, only the other on '
            f'{mcnemar["right_baseline_only"]}: McNemar\'s exact test gives p = {mcnemar["p"]:.3f}. It takes images as '
            f'independent, which those of one patient are not; the intervals below do not.</p>'
            + table(('score', 'difference'),
                     [(in_words(k)[0], format_metric(v)) for k, v in paired['differences'].items()]))))

    body += threshold_section(results)
    body += subgroup_sections(results)
    sure = probabilities.max(1)
    wrong = [i for i in np.argsort(-sure, kind='stable') if probabilities[i].argmax() != labels[i]][:_WORST]
    body.append(fold('Worst errors', f'<p>The {len(wrong)} that were most sure of something else.</p>' + _grid([
        embed(_thumbnail(read_image(paths[i]), 128), 'jpeg', paths[i].name) + '<figcaption>'
        f'Is {names[labels[i]]}, called <b>{names[probabilities[i].argmax()]}</b> with {sure[i]:.1%}.<br>'
        f'{html.escape(results["predictions"][i]["file"])}</figcaption>' for i in wrong])))
    body += _unreadable(results['unreadable'])
    write_html(file, f'{results["model"]} on {dataset["name"]}', results['warnings'], sentence, body)


def threshold_section(results: Dict[str, Any]) -> List[str]:
    """The part of a page on thresholds; none where none was asked for."""
    point = results['threshold']
    if not point:
        return []
    if 'left_out' in point:
        return [f'<h2>Threshold</h2><p>None could be chosen: {html.escape(point["left_out"])}.</p>']
    positive = html.escape(point['positive'])
    asked = ' and '.join(f'a {name} of {point[name]:g}' for name in ('sensitivity', 'specificity')
                         if point[name] is not None)
    two = (' Below the first an image is called negative, from the second on positive, and between them "not sure".'
           if point['low'] != point['high'] else '')
    rows = []
    for name, value in point['metrics'].items():
        words, meaning = _POINT[name]
        words += f' at a prevalence of {point["prevalence"]:g}' if name.endswith('at_prevalence') else ''
        rows.append(f'<div class="score"><div><b>{words}</b>: {format_metric(value)}<small>{meaning}</small></div>'
                    f'{scale_of_scores(value)}</div>')
    return [
        f'<h2>{html.escape(results["model"])} with a threshold</h2>',
        f'<p>Chosen for {asked} on validation images, for {positive}: {point["where"]} '
        f'({html.escape(point["rests_on"])}). Measured on test images, which did not choose it.{two} '
        f'<code>timm-densese predict --calibration metrics.json</code> uses the threshold of the checkpoint that it is '
        f'given.</p>', head_of_scores(results['interval']), *rows]


def subgroup_sections(results: Dict[str, Any]) -> List[str]:
    """A part of a page for each column of the subgroups."""
    return [fold(f'{results["model"]} by {column}', table(
        (html.escape(column), 'images', html.escape(results['unit']), in_words('balanced_accuracy')[0],
         'area under ROC', ''),
        [(html.escape(value), str(part['images']), str(part['groups']),
          format_metric(part['metrics'].get('balanced_accuracy')), format_metric(part['metrics'].get('auroc')),
          'few: this tells little' if part['few'] else '') for value, part in values.items()]))
        for column, values in results['subgroups'].items()]


def _grid(cells: Sequence[str], kind: str = '') -> str:
    return f'<div class="grid {kind}">' + ''.join(f'<figure>{cell}</figure>' for cell in cells) + '</div>'


def _unreadable(errors: Dict[str, str]) -> List[str]:
    rows = [(html.escape(file), html.escape(reason)) for file, reason in errors.items()]
    return [fold('Not readable', table(('file', 'reason'), rows), len(rows))] if rows else []


# The page of an explanation.


class Overlay(NamedTuple):
    """A Grad-CAM overlay that was drawn.

    Attributes:
        label: Class that the image counts for.
        called: Class that the model gives it, which the map is of.
        probability: Of that class.
        file: The overlay, relative to the page.
    """
    label: str
    called: str
    probability: float
    file: str


def write_explanation(
        file: Path,
        model: str,
        overlays: Sequence[Overlay],
        profile: Dict[str, Any],
        gates: Optional[bytes],
) -> None:
    """Write the page of an explanation.

    Args:
        file: File to write, in the folder of the overlays.
        model: Name of the model.
        overlays: What was drawn.
        profile: What `timm_densese.explain.explain` returns.
        gates: The figure of the gates, a PNG file, for a model that has some.
    """
    labels = list(dict.fromkeys(overlay.label for overlay in overlays))
    sites, errors = profile['sites'], profile['unreadable']
    warnings = [f'Images that could not be read, and are not here: {len(errors)}.'] if errors else []
    sentence = f'What {model} looked at in {len(overlays)} images of {len(labels)} classes'
    if sites:
        site, row = next(iter(sites.items()))
        sentence += (f', and what its gates did: those of {site} differ most between classes, with '
                     f'{row["eta_squared"]:.0%} of their variance')
    body = [
        f'<p>{_NOTICE}</p>', '<h2>What it looked at</h2>',
        '<p>Left the photo, right the same with Grad-CAM: red is where the features speak most for the class that the '
        'model calls. It shows where, not why. Each opens at its full size from the folder cam/.</p>']
    room = _OVERLAYS
    for label in sorted(labels):
        every = [overlay for overlay in overlays if overlay.label == label]
        some = every[:min(room, _OVERLAYS_OF_A_CLASS)]
        room -= len(some)
        if not some:
            body.append(f'<p>{html.escape(label)} and the classes after it are in cam/ only.</p>')
            break
        cells = []
        for overlay in some:
            with Image.open(file.parent / overlay.file) as picture:
                thumbnail = embed(_thumbnail(picture, 480), 'jpeg', overlay.file)
            called = html.escape(overlay.called)
            cells.append(
                f'<a href="{quote(os.fsencode(overlay.file))}">{thumbnail}</a><figcaption>'
                + (f'called {called}' if overlay.called == label else f'called <b>{called}</b>, another class,')
                + f' with {overlay.probability:.1%}</figcaption>')
        body += [f'<h3>{html.escape(label)}: {len(some)} of {len(every)} images</h3>', _grid(cells, 'pairs')]
    if gates:
        body += [
            '<h2>What its gates did</h2>',
            '<p>A gate multiplies one channel. At 1, the dotted line, it leaves the channel as it is; at 0 it shuts it '
            'off; at 2 it doubles it. Each line is the mean over the images of one class: where the lines part, the '
            'gate treats the classes differently.</p>', embed(gates, 'png', 'Mean gate of each channel by class'),
            lettering_note(list(profile['images'])),
            fold('Gates in numbers', (
                '<p>Between classes: the share of a gate\'s variance that lies between classes, on average over the '
                f'channels (eta squared). Saturated: above {profile["saturated_above"]}. Dead: below '
                f'{profile["dead_below"]}. Every channel is in excitation.csv.</p>'
                + table(('attention', 'channels', 'mean gate', 'between classes', 'saturated', 'dead'), [
                    (html.escape(site), str(row['channels']), f'{row["mean"]:.3f}', f'{row["eta_squared"]:.3f}',
                     str(row['saturated']), str(row['dead'])) for site, row in sites.items()])), len(sites))]
    else:
        body.append('<p>It has no attention of this package, so there are no gates to show.</p>')
    write_html(file, f'{model}, explained', warnings, sentence + '.', [*body, *_unreadable(errors)])
