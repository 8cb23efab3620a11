"""Model cards: those in the repository are what the command makes, their snippets run, their metadata is the Hub's."""
import html
import io
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import MODELS, put_on_hub
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from timm_densese.cards import _plain, registered_card
from timm_densese.cli import main
from timm_densese.publish import publish

CARDS = Path(__file__).parents[1] / 'model_cards'
METRICS = {
    'dataset': {'name': 'MSLD', 'split': 'test', 'images': 46, 'groups': 32},
    'command': 'timm-densese evaluate', 'interval': '95%, bootstrap by patient',
    'metrics': {'accuracy': {'value': .8125, 'low': .7, 'high': .9}, 'auroc': {'value': .9}},
    'comparison': {'densenet121': {'accuracy': {'value': .75}}},
}


def run_snippets(text, hub):
    image = io.BytesIO()
    Image.new('RGB', (300, 260), (120, 80, 40)).save(image, 'PNG')
    hub.put('datasets/huggingface/documentation-images', {'beignets-task-guide.png': image.getvalue()})
    snippets = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(snippets) == 3
    spaces = []
    for snippet in snippets:
        spaces.append({})
        with torch.inference_mode():
            exec(snippet, spaces[-1])
    shapes = re.findall(r'torch.Size\((\[[\d, ]+\])\)', snippets[1])
    assert [str(list(o.shape)) for o in spaces[1]['output']] == shapes
    assert str(list(spaces[2]['output'].shape)) in snippets[2]
    return spaces


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_card_of_each_registered_model(name, hub, capfd):
    assert main(['card', name]) == 0
    text = (CARDS / f'{name}.md').read_text()
    assert capfd.readouterr().out == text + '\n'

    card = ModelCard(text)
    assert (card.data.library_name, card.data.license) == ('timm', 'apache-2.0')
    for repo in card.data.base_model or []:
        put_on_hub(hub, repo, timm.create_model(name[len('se_'):]))
    assert (card.data.base_model is None) == (name == 'se_densenet264d')
    run_snippets(text, hub)


@pytest.mark.slow
def test_card_of_a_fine_tune(tmp_path, hub, monkeypatch, capfd):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    net = timm.create_model('se_densenet121', num_classes=2)
    torch.save({'arch': 'se_densenet121', 'state_dict': net.state_dict()}, tmp_path / 'best.pth.tar')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(
        {'class_names': ['猴痘 a|b', '<script>#x'], 'pretrained': True, 'lr': .01, 'img_size': 64,
         'data_dir': '/home/me'}))
    (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
    assert main(['card', str(tmp_path / 'best.pth.tar'), 'owner/tuned', '--metrics', str(tmp_path / 'metrics.json'),
                 '--output', str(tmp_path / 'cards' / 'tuned.md')]) == 0
    text = (tmp_path / 'cards' / 'tuned.md').read_text()
    publish(tmp_path / 'best.pth.tar', 'owner/tuned', metrics=tmp_path / 'metrics.json')
    assert hub.read('owner/tuned', 'README.md').decode() == text

    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == ('timm/densenet121.ra_in1k', ['imagenet-1k'], 'apache-2.0')
    results = {r.metric_type: r.metric_value for r in data.eval_results}
    assert results == {'accuracy': .8125, 'roc_auc': .9}
    assert (data.eval_results[0].dataset_name, data.eval_results[0].dataset_split) == ('MSLD', 'test')
    for part in ('0.812 (0.700 to 0.900)', '|densenet121|0.750||', '32 patients', 'bootstrap by patient', '- lr: 0.01',
                 r'fine-tuned to 2 classes: 猴痘 a\|b, &lt;script&gt;\#x',
                 'Image size: 64 x 64', 'pip install .  # in a clone of timm-densese'):
        assert part in text, part
    assert '/home/me' not in text
    classify, _, _ = run_snippets(text, hub)
    assert set(classify['labels']) == {'猴痘 a|b', '<script>#x'}


@pytest.mark.parametrize('name', [
    '猴痘', 'मंकीपॉक्स', 'ฝีดาษลิง', "Bowen's disease (M) & co.", 'a|b',
    '<img src=x onerror=alert(1)>', '[here](https://a.b)',
    '![](x)', '**bold** _x_ chest_x', '`code`', 'https://a.b www.a.b', '&lt;b&gt;', '# heading', '$x$'])
def test_names_keep_their_characters_and_become_nothing_else(name):
    markdown = MarkdownIt('commonmark').enable(['table', 'strikethrough'])
    page = markdown.render(f'Fine-tuned to classes: {_plain(name)}.')
    assert html.unescape(re.sub('</?p>', '', page)).strip() == f'Fine-tuned to classes: {name}.'
    cell = markdown.render(f'|model|\n|---|\n|{_plain(name)}|')
    assert cell.count('<td>') == cell.count('<th>') == 1
    assert html.unescape(re.search('<td>(.*)</td>', cell)[1]) == name
    assert not re.search(r'(?<!\\)://|www\.', _plain(name))  # of which GitHub's Markdown makes links


def test_names_stay_in_their_line_and_direction():
    assert _plain('a\n# b\u202ec\x00') == r'a \# bc'


def test_no_number_that_was_not_measured():
    text = str(registered_card('se_densenet121'))
    assert 'Accuracy: not measured.' in text
    assert 'model-index' not in text


def test_card_of_nothing(capfd):
    assert main(['card', 'resnet50']) == 1
    assert 'not one of se_densenet121' in capfd.readouterr().err


def test_a_card_is_not_written_over_a_checkpoint(tmp_path):
    (tmp_path / 'best.pth.tar').write_bytes(b'weights')
    assert main(['card', 'se_densenet121', '--output', str(tmp_path / 'best.pth.tar')]) == 2
    assert (tmp_path / 'best.pth.tar').read_bytes() == b'weights'
