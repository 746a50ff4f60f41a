"Widgets in a real browser: Chromium without a screen, JupyterLab with a kernel. Skipped where either is missing."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest

root = Path(__file__).parent.parent
browser, driver_path = (next(filter(None, map(shutil.which, names)), None)
                        for names in (('chromium', 'chromium-browser', 'google-chrome'), ('chromedriver',)))
if not browser or not driver_path: pytest.skip('no Chromium and chromedriver on this machine', allow_module_level=True)
webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from mamlpp_nb.drawing import recorded  # noqa: E402
from mamlpp_nb.rates import rate_chart, rates_player  # noqa: E402
from mamlpp_nb.reproduce import read_records  # noqa: E402

patience = 120 # seconds; a test fails long before if it can


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
                 '--disable-background-networking', '--disable-component-update', '--disable-sync',
                 '--window-size=1400,1400', f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of its own: its address and folder."
    folder = tmp_path_factory.mktemp('lab')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    words = ['lab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
             f'--ServerApp.root_dir={folder}', '--IdentityProvider.token=', '--LabApp.news_url=',
             '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    env = {**os.environ,
           **{f'JUPYTER_{k}_DIR': str(folder / '.jupyter' / k) for k in ('CONFIG', 'DATA', 'RUNTIME')},
           'PYTHONPATH': str(root)}
    server = subprocess.Popen([sys.executable, '-m', 'jupyter', *words], env=env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(patience):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=5)
            break
        except OSError:
            assert server.poll() is None
            time.sleep(1)
    yield f'http://127.0.0.1:{port}', folder
    server.terminate()
    try: server.wait(10)
    except subprocess.TimeoutExpired: server.kill()


def wait(driver, condition):
    return WebDriverWait(driver, patience, ignored_exceptions=(
        StaleElementReferenceException, ElementNotInteractableException)).until(condition)


def run_cell(driver, lab, source):
    "A notebook of one cell, run; its outputs are on the page."
    address, folder = lab
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)],
                                            metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}}),
                   folder / 'page.ipynb')
    driver.get(f'{address}/doc/tree/page.ipynb?reset')
    # the kernel is there
    wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, '.jp-Notebook-ExecutionIndicator[data-status="idle"]'))
    def run(d): # a kernel that has just started may not hear it
        d.find_element(By.CSS_SELECTOR, '.jp-CodeCell .cm-content').click()
        ActionChains(d).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        for _ in range(20):
            time.sleep(.5)
            if re.search(r'[*\d]', d.find_element(By.CSS_SELECTOR, '.jp-CodeCell .jp-InputPrompt').text): return True
    wait(driver, run)


@pytest.mark.weekly
def test_a_task_drawn_by_mouse(chromium, lab):
    run_cell(chromium, lab, 'from mamlpp_nb.drawing import drawing_pad\ndrawing_pad()')
    canvases = wait(chromium, lambda d: (found := d.find_elements(By.CSS_SELECTOR, '.jp-OutputArea canvas'))
                    and len(found) == 6 and found)
    for canvas, strokes in zip(canvases, recorded.values()):
        w, h = canvas.size['width'], canvas.size['height']
        for stroke in strokes:
            (x, y), *rest = [(round((a - .5) * w), round((b - .5) * h)) for a, b in stroke]
            moves = ActionChains(chromium, duration=20).move_to_element_with_offset(canvas, x, y).click_and_hold()
            for x, y in rest: moves = moves.move_to_element_with_offset(canvas, x, y)
            moves.release().perform()
    said = lambda d: next((e.text for e in d.find_elements(By.CSS_SELECTOR, '.widget-label')
                           if e.text.startswith('It says')), None)
    # the answer after the last stroke; there is one after each
    wait(chromium, lambda d: (said(d) or '').startswith('It says B'))
    ink = ("const c = arguments[0]; "
           "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)")
    assert all(chromium.execute_script(ink, c) for c in canvases)
    wait(chromium, lambda d: d.find_elements(By.CSS_SELECTOR, '.jp-OutputArea img'))
    chromium.find_element(By.XPATH, "//button[contains(., 'clear')]").click()
    wait(chromium, lambda d: not said(d) and not any(d.execute_script(ink, c) for c in canvases))


@pytest.mark.weekly
def test_the_slider_of_learned_rates_with_a_kernel(chromium, lab):
    tables = str(root / 'nbs/results/tables')
    run_cell(chromium, lab, f"""%matplotlib inline
from mamlpp_nb.rates import rate_chart, rates_slider
from mamlpp_nb.reproduce import read_records
rates_slider(rate_chart(read_records({tables!r}, 'omniglot-small')['5w1s-mamlpp'], 'rates'))""")
    picture = lambda d: next((e.get_attribute('src') for e in d.find_elements(By.CSS_SELECTOR, '.jp-OutputArea img')
                              if e.get_attribute('src').startswith('data:image/png')), None)
    readout = lambda d: d.find_element(By.CSS_SELECTOR, '.widget-readout').text
    first = wait(chromium, picture)
    assert readout(chromium) == 'best'
    handle = chromium.find_element(By.CSS_SELECTOR, '.noUi-handle')
    handle.send_keys(Keys.ARROW_RIGHT)
    wait(chromium, lambda d: readout(d) == '1')
    wait(chromium, lambda d: picture(d) not in (None, first))


def committed():
    return [rate_chart(read_records(root / 'nbs/results/tables', table)[row], title)
            for table, row, title in (('omniglot-small', '5w1s-mamlpp', 'Omniglot'),
                                      ('mini-imagenet-small', '5w1s-mamlpp', 'mini-ImageNet'))]


def dots(driver):
    "The dots drawn: height in the picture, and what pointing at one says: its name and its rate."
    found = driver.execute_script("return [...document.querySelectorAll('.rates-player circle')].map("
                                  "c => [+c.getAttribute('cy'), ...c.textContent.split(': ')])")
    return [(y, name, float(rate)) for y, name, rate in found]


def expected(chart, epochs):
    names = [k.replace('.weight', '') for k in chart.names]
    return {f'seed {seed}, epoch {e + 1}, step {k + 1}, {name}': chart.values[s, e, i, k]
            for s, (seed, e) in enumerate(zip(chart.seeds, epochs))
            for i, name in enumerate(names) for k in range(chart.values.shape[3])}


def use(driver, charts):
    "Every chart of the player on the page, epoch by epoch; then it plays."
    wait(driver, dots)
    choice, slider, said, button = (driver.find_element(By.CSS_SELECTOR, f'.rates-player {tag}')
                                    for tag in ('select', 'input', 'output', 'button'))
    for chart in charts:
        choice.send_keys(chart.title)
        epochs = range(chart.values.shape[1])
        for name, of_seeds in [('best', chart.best), *((str(e + 1), [e] * len(chart.seeds)) for e in epochs)]:
            if name != 'best': slider.send_keys(Keys.ARROW_RIGHT)
            drawn = dots(driver)
            assert said.text == name and {k: rate for _, k, rate in drawn} == pytest.approx(
                expected(chart, of_seeds), rel=1e-3, abs=1e-9)
            heights, rates = np.array([(y, rate) for y, _, rate in drawn]).T
            # inside the axes, the higher rate higher
            assert (heights.min() > 40 and heights.max() < 230
                    and np.corrcoef(heights, rates)[0, 1] == pytest.approx(-1))
    button.click() # at the last epoch: from the start again
    wait(driver, lambda d: said.text not in ('best', name))
    wait(driver, lambda d: said.text == name and button.text == 'play')


def test_the_player_of_learned_rates_without_a_kernel(chromium, tmp_path):
    (tmp_path / 'player.html').write_text(f'<!doctype html><meta charset="utf-8">{rates_player(*committed())}')
    chromium.get((tmp_path / 'player.html').as_uri())
    use(chromium, committed())


@pytest.mark.weekly
def test_the_player_of_learned_rates_in_a_notebook(chromium, lab):
    run_cell(chromium, lab, f"""from IPython.display import HTML
from mamlpp_nb.rates import rate_chart, rates_player
from mamlpp_nb.reproduce import read_records
HTML(rates_player(rate_chart(read_records({str(root / 'nbs/results/tables')!r}, 'omniglot-small')\
['5w1s-mamlpp'], 'Omniglot')))""")
    # it has run; nothing is drawn anew
    wait(chromium, lambda d: re.search(r'\d', d.find_element(By.CSS_SELECTOR, '.jp-CodeCell .jp-InputPrompt').text))
    use(chromium, committed()[:1])


def test_the_player_on_the_committed_page_draws(chromium, tmp_path):
    page = json.loads((root / 'nbs/22_learned_rates.ipynb').read_text())
    player, = (text for c in page['cells'] if c['cell_type'] == 'code' for o in c['outputs']
               if 'rates-player' in (text := ''.join(o.get('data', {}).get('text/html', ''))))
    (tmp_path / 'page.html').write_text(f'<!doctype html><meta charset="utf-8">{player}')
    chromium.get((tmp_path / 'page.html').as_uri())
    for title in chromium.execute_script("return [...document.querySelectorAll('option')].map(o => o.textContent)"):
        Select(chromium.find_element(By.TAG_NAME, 'select')).select_by_visible_text(title)
        assert ('reduced' in title and title in chromium.find_element(By.TAG_NAME, 'svg').text
                and len(dots(chromium)) == 90)


def test_a_page_that_nbconvert_made_shows_its_figures_and_plays(chromium, tmp_path):
    exporter = pytest.importorskip('nbconvert', reason='nbconvert is not installed').HTMLExporter()
    (tmp_path / 'page.html').write_text(exporter.from_filename(str(root / 'nbs/22_learned_rates.ipynb'))[0],
                                        encoding='utf-8')
    chromium.get((tmp_path / 'page.html').as_uri())
    wait(chromium, lambda d: len(dots(d)) == 90)
    sizes = chromium.execute_script("return [...document.querySelectorAll('.jp-OutputArea img')].map("
                                    "i => i.complete ? i.naturalWidth : 0)")
    assert sizes and min(sizes) > 100
