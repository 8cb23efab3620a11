"""The page in a real browser."""
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from PIL import Image

from timm_densese.serve import MAX_MEGAPIXELS


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    """Headless Chromium."""
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.skip('Chromium is missing: make chromium, or install chromium and its driver')
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,1100'):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


@contextmanager
def serving(model, *args, port=7897, **env):
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_densese', 'serve', str(model), '--port', str(port), *args],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': '1', 'BROWSER': 'true', **env})
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if 'Running on' in line:
                break
        else:
            raise AssertionError(''.join(said))
        yield f'http://127.0.0.1:{port}', ''.join(said)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except Exception as e:  # the page is being redrawn
            if time.monotonic() > deadline:
                raise AssertionError('nothing came') from e
        assert time.monotonic() < deadline, 'nothing came'
        time.sleep(.2)


@pytest.mark.slow
def test_the_page_predicts_and_refuses(browser, trained, tmp_path):
    from selenium.webdriver.common.by import By

    image = min((trained[0] / 'test' / 'stripes').iterdir())
    Image.new('1', (9000, 5000)).save(tmp_path / 'huge.png')
    assert MAX_MEGAPIXELS < 45
    (tmp_path / 'text.png').write_text('no image')
    with serving(trained[1]) as (url, said):
        assert 'no medical device' in said
        browser.get(url)
        wait_for(lambda: browser.find_element(By.ID, 'predict'))
        assert 'no medical device' in browser.find_element(By.TAG_NAME, 'body').text

        def predict(file):
            for clear in browser.find_elements(By.CSS_SELECTOR, '#upload button[aria-label="Clear"]'):
                clear.click()
            field = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, '#upload input[type=file]'))
            field.send_keys(str(file))
            wait_for(lambda: file.stem[:5] in browser.find_element(By.ID, 'upload').text)
            browser.find_element(By.ID, 'predict').click()

        predict(image)
        text = wait_for(lambda: re.search(r'(spots|stripes)\s+(\d+)%', browser.find_element(By.ID, 'prediction').text))
        assert int(text[2]) >= 50
        cam = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, '#cam img'))
        wait_for(lambda: cam.get_property('naturalWidth') == 96)
        wait_for(lambda: browser.find_element(By.CSS_SELECTOR, '#gates img').get_property('naturalWidth') > 300)
        browser.save_screenshot(str(tmp_path / 'page.png'))
        assert Image.open(tmp_path / 'page.png').convert('L').getextrema() != (255, 255)

        def says(message):
            toasts = browser.find_elements(By.CSS_SELECTOR, '.toast-body')
            return message in ' '.join(toast.text for toast in toasts)

        for name, message in (('huge.png', 'megapixels'), ('text.png', 'cannot be read')):
            predict(tmp_path / name)
            wait_for(lambda message=message: says(message))
        (tmp_path / 'large.png').write_bytes(bytes(11 << 20))
        browser.find_element(By.CSS_SELECTOR, '#upload button[aria-label="Clear"]').click()
        wait_for(lambda: browser.find_element(By.CSS_SELECTOR, '#upload input[type=file]')).send_keys(
            str(tmp_path / 'large.png'))
        wait_for(lambda: says('maximum allowed size'))


@pytest.mark.slow
def test_a_port_that_is_taken(trained, run_alone):
    """By another page, which works behind a proxy; --host is warned of."""
    with serving(trained[1], port=7898, HTTP_PROXY='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9'):
        result = run_alone('serve', trained[1], '--port', 7898, '--host', '0.0.0.0')
    assert result.returncode == 1
    assert 'Choose another --port' in result.stderr
    assert 'WARNING: --host 0.0.0.0 opens the page to everybody' in result.stderr
    assert 'Traceback' not in result.stderr
