"""The pages in a real browser, and the letters of the figures."""
import io
import shutil

import matplotlib
import numpy as np
import pytest
from conftest import PageReader
from matplotlib import font_manager
from PIL import Image

from timm_densese import figures
from timm_densese.figures import draw_figures, figure_style
from timm_densese.metrics import bootstrap, score, with_intervals
from timm_densese.report import write_page


def write(folder, names, images=40, groups=None, warnings=()):
    """The page of random answers, some of them wrong."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % len(names)
    p = rng.dirichlet(np.ones(len(names)), images)
    samples = bootstrap(np.arange(images), 20, 0)
    scores = with_intervals(lambda weights: score(labels, p, names, None, weights), samples)
    Image.new('RGB', (60, 40)).save(folder / 'image.png')
    paths = [folder / 'image.png'] * images
    results = {
        'model': 'run/<b>', 'dataset': {'name': 'data', 'split': 'test', 'images': images, 'groups': groups},
        'classes': names, 'interval': '95% interval', 'temperature': None, 'warnings': list(warnings), 'unreadable': {},
        'threshold': None, 'subgroups': {},
        'metrics': {k: v for k, v in scores.items() if '/' not in k},
        'per_class': {n: {k.split('/')[0]: v for k, v in scores.items() if k.endswith(f'/{n}')} for n in names},
        'predictions': [{'file': path.name} for path in paths]}
    write_page(folder / 'report.html', results, draw_figures(labels, p, None, names), paths, labels, p)
    return results['metrics']


def test_the_page_begins_with_warnings_and_the_score(tmp_path):
    metrics = write(tmp_path, ['a', '<b>', '水痘'], groups=7, warnings=['LEAK: 3 <i>', 'No val/.'])
    page = PageReader((tmp_path / 'report.html').read_text(encoding='utf-8'))
    best = metrics['balanced_accuracy']
    assert page.text.startswith(
        f'LEAK: 3 <i> No val/. run/<b> has a balanced accuracy of {best["value"]:.3f} (95% interval {best["low"]:.3f} '
        f'to {best["high"]:.3f}) on 40 images of 7 patients or groups.')
    for part in ('area under the ROC curve', 'guessing gives 0.33', 'log loss', 'guessing gives 1.10', 'Brier score',
                 'calibration error', 'Is 水痘, called'):
        assert part in page.text
    assert 'balanced_accuracy' not in page.text
    write(tmp_path, ['a', 'b'])
    assert 'on 40 images (of how many patients is not known).' in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_points_and_intervals_lie_at_their_values(tmp_path):
    metrics = write(tmp_path, ['a', 'b', 'c'])
    page = (tmp_path / 'report.html').read_text()
    for metric in metrics.values():
        low, value, high = (100 * min(metric[k], 1) for k in ('low', 'value', 'high'))
        assert f'left:{low:.1f}%;width:{high - low:.1f}%"></i><i class="point" style="left:{value:.1f}%"' in page
    assert page.count('→') == sum(metric['high'] > 1 for metric in metrics.values()) > 0


def test_names_are_drawn_or_numbered_never_boxes(tmp_path):
    strange = ['plain', 'a$b$c$', '_under', '\U000f0000private', 'two\nlines', 'x' * 200 + 'end']
    with figure_style(strange) as drawn:
        assert drawn[:5] == ('plain', r'a\$b\$c\$', ' _under', 'class 4', 'class 5')
        assert drawn[5].endswith('end')
        assert len(drawn[5]) <= 30
    assert 'class 4 is \U000f0000private' in figures.lettering_note(strange)
    assert figures.lettering_note(['plain', 'class 2']) == ''
    labels = np.arange(18) % 6
    for content in draw_figures(labels, np.full((18, 6), 1 / 6), None, strange).values():
        assert Image.open(io.BytesIO(content)).size[0] > 300


def test_a_font_that_has_the_letters_is_taken():
    """A letter of STIX, which comes with matplotlib, stands for those of the system's fonts."""
    has = font_manager.findfont('STIXGeneral')  # not its bold, which has no letter more
    first = font_manager.get_font(font_manager.findfont('DejaVu Sans')).get_charmap()
    only_there = sorted(set(font_manager.get_font(has).get_charmap()) - set(first))
    letter = next(chr(c) for c in only_there if chr(c).isalpha() and c < 0xe000)
    with figure_style([letter]) as drawn:
        assert drawn == (letter,)
        assert len(matplotlib.rcParams['font.family']) > 1
    assert matplotlib.rcParams['font.family'] == ['sans-serif']


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('chromium') and shutil.which('chromedriver')), reason='Chromium is missing')
def test_the_page_fits_a_phone_and_paper(tmp_path):
    from selenium import webdriver

    write(tmp_path, [f'{"long" * 20} {i}' for i in range(35)], images=70)  # a long table is folded at first
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage'):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    try:
        for width in (400, 1200):
            driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
                'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width == 400})
            driver.get((tmp_path / 'report.html').as_uri())
            assert driver.execute_script('return document.documentElement.scrollWidth') <= width
        shows = 'return document.querySelector("details:not([open]) table").checkVisibility()'
        assert not driver.execute_script(shows)
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print'})
        assert driver.execute_script(shows)
    finally:
        driver.quit()
