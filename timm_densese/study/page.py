"""The page of a study, and its figure: each model's difference from the first."""
import html
import io
from pathlib import Path
from typing import Any, Dict

from ..figures import figure_style
from ..metrics import format_metric
from ..report import (
    embed,
    fold,
    head_of_scores,
    in_words,
    scale_of_scores,
    subgroup_sections,
    table,
    threshold_section,
    write_html,
)

__all__ = ['draw_differences', 'write_study']


def draw_differences(results: Dict[str, Any]) -> bytes:
    """Draw each model's difference from the first, with its interval.

    Args:
        results: What metrics.json holds, of `timm_densese.study.study`.

    Returns:
        A PNG file; empty where there is nothing to compare.
    """
    from matplotlib.figure import Figure  # not pyplot, which would switch a notebook's backend

    compared = {name: model for name, model in results['models'].items() if 'differences' in model}
    if not compared:
        return b''
    title = in_words(results['primary'])[0]
    with figure_style():
        figure = Figure(figsize=(7, 1.2 + .6 * len(compared)), layout='constrained')
        ax: Any = figure.subplots()
        ax.axvline(0, color='gray', lw=1)
        for i, model in enumerate(compared.values()):
            difference = model['differences'][results['primary']]
            value = difference['value']
            low, high = difference.get('low', value), difference.get('high', value)
            told = model['test']['verdict'] != 'cannot tell'
            ax.errorbar(value, i, xerr=[[max(0, value - low)], [max(0, high - value)]], fmt='o', capsize=4,
                        color='#2563eb' if told else '#64748b')
        labels = [name.replace(' ', '\n').replace('$', r'\$') for name in compared]
        ax.set(yticks=range(len(compared)), yticklabels=labels,
               ylim=(len(compared) - .5, -.5), xlabel=f'worse    ←    difference in {title}    →    better')
        content = io.BytesIO()
        figure.savefig(content, dpi=100)
    return content.getvalue()


def _sentence(results: Dict[str, Any]) -> str:
    best = results['models'][results['model']]
    score = best['metrics'][results['primary']]
    interval = f'95% interval {score["low"]:.3f} to {score["high"]:.3f}' if 'low' in score else 'interval undefined'
    told = {verdict: [name for name, model in results['models'].items()
                      if model.get('test', {}).get('verdict') == verdict] for verdict in ('better', 'worse')}
    said = [f'{", ".join(names)} {"is" if len(names) == 1 else "are"} {verdict} than {results["baseline"]}'
            for verdict, names in told.items() if names]
    if not any('test' in model for model in results['models'].values()):
        said = [f'nothing was compared: there is no other model whose runs are whole beside {results["baseline"]}\'s']
    elif not said:
        said = [f'these data cannot tell whether any model is better or worse than {results["baseline"]}']
    first = (f'The highest {in_words(results["primary"])[0]} is that of {results["model"]}: {score["value"]:.3f} '
             f'({interval}), on {results["dataset"]["images"]} images')
    groups = results['dataset']['groups']
    return '; '.join([first + (f' of {groups} {results["unit"]}' if groups else ''), *said]) + '.'


def write_study(file: Path, results: Dict[str, Any], figure: bytes) -> None:
    """Write the page of a study.

    Args:
        file: File to write.
        results: What metrics.json holds, of `timm_densese.study.study`.
        figure: What `draw_differences` drew.
    """
    models, baseline = results['models'], results['baseline']
    title = in_words(results['primary'])[0]
    classes = len(results['classes'])
    seeds = sorted({len(model['seeds']) for model in models.values()})
    trainings = ' to '.join(map(str, sorted({seeds[0], seeds[-1]}))) + (' training' if seeds == [1] else ' trainings')
    body = [
        f'<p>{html.escape(results["conditions"])} {len(models)} models, {results["folds"]} folds, {trainings} of each. '
        f'The highest of several scores on the same images is a little too high. For research. This is no medical '
        f'device.</p>',
        f'<h2>{title.capitalize()} of each model</h2>', head_of_scores(results['interval'])]
    for name, model in models.items():
        score = model['metrics'][results['primary']]
        said = model['test']['words'] if 'test' in model else 'the baseline' if name == baseline else ''
        body.append(f'<div class="score"><div><b>{html.escape(name)}</b>: {format_metric(score)}'
                    f'<small>{html.escape(said)}</small></div>'
                    f'{scale_of_scores(score, "" if name == results["model"] else "other")}</div>')
    if figure:
        body += [f'<h2>Differences from {html.escape(baseline)}</h2>', _explain_test(results),
                 f'<figure>{embed(figure, "png", "differences with their intervals")}</figure>']
    body += threshold_section(results)
    body += subgroup_sections(results)
    scores = list(models[results['model']]['metrics'])
    body.append(fold('Every score', table(
        ('score', *map(html.escape, models)),
        [(in_words(name)[0], *(format_metric(model['metrics'].get(name)) for model in models.values()))
         for name in scores]) + ''.join(f'<p><small><b>{in_words(name, classes)[0]}</b>: '
                                        f'{in_words(name, classes)[1]}</small></p>' for name in scores)))
    body.append(fold('By class', table(
        ('model', 'class', 'precision', 'recall', 'specificity', 'area under ROC'),
        [(html.escape(name), html.escape(label),
          *(format_metric(values.get(key)) for key in ('precision', 'recall', 'specificity', 'auroc')))
         for name, model in models.items() for label, values in model['per_class'].items()])))
    if figure:
        body.append(fold('Every difference', table(
            ('score', *(html.escape(name) for name, model in models.items() if 'differences' in model)),
            [(in_words(name)[0], *(format_metric(model['differences'].get(name)) for model in models.values()
                                   if 'differences' in model)) for name in scores])
            + f'<p><small>Only {title} was chosen before to decide. Of so many numbers, some differ by chance.</small>'
              f'</p>'))
    if results['failed']:
        body.append(fold('Runs that failed', table(
            ('run', 'why'), [(html.escape(title), html.escape(error)) for title, error in results['failed'].items()])))
    write_html(file, f'Study of {len(models)} models on {results["dataset"]["name"]}', results['warnings'],
               _sentence(results), body)


def _explain_test(results: Dict[str, Any]) -> str:
    tests = [(name, model['test']) for name, model in results['models'].items() if 'test' in model]
    rows = [(html.escape(name), html.escape(test['verdict']),
             '' if test['detectable'] is None else f'{test["detectable"]:.3f}') for name, test in tests]
    return (
        '<p>"Better" and "worse" are said where two agree: a t-test over folds, corrected for training sets '
        'that overlap (Nadeau and Bengio) and for the number of models (Holm), at a level of 5%; and the interval over '
        f'{html.escape(results["unit"])} and seeds.</p>'
        + table(('model', 'found', 'would be found four times in five: a difference of'), rows))
