"""The figures of an evaluation, and the look that all figures share."""
import html
import io
import logging
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np

from .metrics import confusion_matrix, expected_calibration_error

__all__ = ['draw_figures', 'figure_style', 'lettering_note']

_INK = '#1e293b'  # as the pages of report.py


@lru_cache(maxsize=8)
def _lettering(names: Tuple[str, ...]) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Fonts of this computer that have the letters of names, and the names as these fonts can draw them."""
    from matplotlib import font_manager

    fonts, missing = ['DejaVu Sans'], {c for name in names for c in name if c.isprintable()}
    missing -= {chr(c) for c in font_manager.get_font(font_manager.findfont(fonts[0])).get_charmap()}
    if missing:
        known = {f.fname for f in font_manager.fontManager.ttflist}
        for file in set(font_manager.findSystemFonts()) - known:  # installed since matplotlib made its list
            with suppress(Exception):  # FreeType raises whatever a broken file makes it raise
                font_manager.fontManager.addfont(file)
        found = [f for f in font_manager.fontManager.ttflist if not any(  # those draw boxes, or pictures
            word in f.name for word in ('Last', 'Color', 'Emoji'))]
        for font in sorted(found, key=lambda f: ('Sans' not in f.name, f.style != 'normal', f.name)):
            try:
                letters = missing & {chr(c) for c in font_manager.get_font(font.fname).get_charmap()}
            except Exception:  # a file that is gone or broken
                continue
            if letters:
                fonts.append(font.name)
                missing -= letters
    drawn = []
    for i, name in enumerate(names):
        if missing & set(name) or not name.isprintable():
            name = f'class {i + 1}'
        name = name if len(name) <= 30 else f'{name[:16]}…{name[-13:]}'
        # matplotlib reads $ as mathematics, and leaves out of legends what starts with _.
        drawn.append((' ' + name if name.startswith('_') else name).replace('$', r'\$'))
    return tuple(fonts), tuple(drawn)


@contextmanager
def figure_style(names: Sequence[str] = ()) -> Iterator[Tuple[str, ...]]:
    """Give the figures drawn and saved inside the look of the pages, and fonts that have the letters of names.

    Args:
        names: Names of classes.

    Yields:
        The names as they can be drawn; 'class 3' for the third where no font of this computer has its letters.
    """
    import matplotlib

    fonts, drawn = _lettering(tuple(names))
    logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)  # that a font has one weight is no news
    with matplotlib.rc_context({
            'font.family': list(fonts), 'axes.spines.top': False, 'axes.spines.right': False,
            'text.color': _INK, 'axes.labelcolor': _INK, 'axes.titlesize': 11, 'legend.fontsize': 8}):
        yield drawn


def lettering_note(names: Sequence[str]) -> str:
    """Say, as HTML, which class names the figures number since no font has their letters; nothing where all have."""
    drawn = _lettering(tuple(names))[1]
    absent = [f'{shown} is {html.escape(name)}' for i, (shown, name) in enumerate(zip(drawn, names, strict=True))
              if shown == f'class {i + 1}' != name]
    return (f'<p>No font of the computer that drew the figures has the letters of every class name. In them, '
            f'{", ".join(absent)}.</p>') if absent else ''


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

    with figure_style(classes) as names:
        legible = len(names) <= 40
        side = 3.6 + .25 * min(len(names), 40)
        figure = Figure(figsize=(side, side), layout='constrained')
        ax: Any = figure.subplots()
        ConfusionMatrixDisplay(confusion_matrix(labels, probabilities), display_labels=names if legible else None).plot(
            ax=ax, cmap='Blues', colorbar=not legible, include_values=legible,
            xticks_rotation='vertical' if len(names) > 3 else 'horizontal')
        if not legible:
            ax.set(xticks=[], yticks=[])
        ax.set(title='images', xlabel='called by the model', ylabel='class')
        save('confusion.png', figure)

        shown = [i for i in range(len(names)) if 0 < (labels == i).sum() < len(labels)][:10]
        of = ' / '.join(names[i][:16] for i in shown) if len(shown) <= 2 else 'the class'
        found = f'recall: share of {of} found'
        for name, display, axes in (
                ('roc.png', RocCurveDisplay, {
                    'title': 'ROC, each class against the others', 'xlabel': f'share of the others called {of}',
                    'ylabel': found}),
                ('pr.png', PrecisionRecallDisplay, {
                    'title': 'precision and recall of each class', 'xlabel': found,
                    'ylabel': f'precision: share right, called {of}'})):
            figure = Figure(figsize=(4.2, 4.2 + .17 * len(shown)), layout='constrained')
            ax = figure.subplots()
            for i in shown:
                display.from_predictions(labels == i, probabilities[:, i], name=names[i], ax=ax)
            if shown:
                ax.get_legend().remove()  # it would hide curves
                figure.legend(loc='outside lower center')
            ax.set(**axes)
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
