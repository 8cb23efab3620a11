"""Model cards: Markdown in the form of timm's own, with the metadata that the Hugging Face Hub reads.

A card holds what was counted, recorded or measured, and nothing else: a number that no file gives is not there.
"""
import copy
import html
import re
import unicodedata
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import DenseNet

from .checkpoints import split_source
from .data.msld import MSLD_CITATION, MSLD_LICENSE, MSLD_LIMITS, MSLD_TERMS
from .errors import PublishError
from .metrics import format_metric
from .models.se_densenet import default_cfgs
from .models.stats import model_stats, placement_stats

__all__ = ['finetune_card', 'registered_card']

_PAPERS = """\
- Densely Connected Convolutional Networks: https://arxiv.org/abs/1608.06993
  - Squeeze-and-Excitation Networks: https://arxiv.org/abs/1709.01507"""

# As timm's cards print it, except that the image comes from the Hub by its client: from the cache and mirrors too.
_SNIPPET = """\
### {title}
```python
from huggingface_hub import hf_hub_download
from PIL import Image
import timm
{register}import torch

img = Image.open(hf_hub_download(
    'huggingface/documentation-images', 'beignets-task-guide.png', repo_type='dataset')).convert('RGB')

model = timm.create_model('{load}', pretrained={pretrained}{option}
model = model.eval()

# get model specific transforms (normalization, resize)
data_config = timm.data.resolve_model_data_config(model)
transforms = timm.data.create_transform(**data_config, is_training=False)

output = model(transforms(img).unsqueeze(0))  # unsqueeze single image into batch of 1

{then}
```"""
_TOP_K = """\
probabilities, class_indices = torch.topk(output.softmax(dim=1) * 100, k={k})"""
_LABELS = """
labels = [model.pretrained_cfg['label_names'][i] for i in class_indices[0]]"""
_FEATURES = """\
for o in output:
    # print shape of each feature map in output
    # e.g.:
{shapes}
    print(o.shape)"""
_EMBEDDING = """\
# output is a (batch_size, num_features) shaped tensor
print(output.shape)  # torch.Size([1, {num_features}])"""

_CITATION = """\
```bibtex
@inproceedings{huang2017densely,
  title={Densely Connected Convolutional Networks},
  author={Huang, Gao and Liu, Zhuang and van der Maaten, Laurens and Weinberger, Kilian Q.},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2017}
}
```
```bibtex
@inproceedings{hu2018squeeze,
  title={Squeeze-and-Excitation Networks},
  author={Hu, Jie and Shen, Li and Sun, Gang},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2018}
}
```
```bibtex
@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}
```"""
_TAGS = ('densenet', 'squeeze-and-excitation')
# Names of metrics on the Hub, where they are other than ours.
_METRIC_TYPES = {'auroc': 'roc_auc', 'auprc': 'average_precision'}
# Of a run's options, those that say how the weights came about. No paths: they name somebody's machine.
_RECIPE = (
    'pretrained', 'epochs', 'batch_size', 'grad_accum_steps', 'opt', 'lr', 'weight_decay', 'layer_decay', 'clip_grad',
    'sched', 'warmup_epochs', 'warmup_lr', 'min_lr', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob',
    'mixup', 'cutmix', 'smoothing', 'class_weights', 'drop', 'model_ema', 'model_ema_decay', 'amp', 'eval_metric',
    'patience', 'seed')


def registered_card(name: str, metrics: Optional[Dict[str, Any]] = None) -> ModelCard:
    """Make the card of a registered model, which starts from a DenseNet's weights.

    Args:
        name: Name of the model, `se_densenet121` for example.
        metrics: Metrics of what was trained from it, see `timm_densese.metrics.read_metrics`. They are shown, and are
            not in the metadata, which is about the weights themselves.

    Returns:
        The card.

    Raises:
        PublishError: There is no such model.
    """
    if name not in default_cfgs:
        raise PublishError(f'{name} is not one of {", ".join(sorted(default_cfgs))}.')
    weights = {tag: cfg.hf_hub_id for tag, cfg in default_cfgs[name].cfgs.items() if cfg.has_weights}
    densenet = name[len('se_'):]
    model: Any = timm.create_model(name, device='meta')
    load = f'{name}.{next(iter(weights))}' if weights else name
    start = (
        'It starts from ' + ' or '.join(f'`{repo}` (`{name}.{tag}`)' for tag, repo in weights.items())
        + ", and gives that DenseNet's outputs until the first training step." if weights else
        'No pretrained weights exist: it starts from random ones.')
    comparison = '\n'.join([
        '|model|attentions|params (M)|GMACs|activations (M)|', '|---|---|---|---|---|',
        *(f'|{f"`se_placement={placement!r}`" if placement else "DenseNet"}|{sites}|{s["params"]:.2f}|'
          f'{s["macs"] / 1e3:.3f}|{s["activations"]:.2f}|' for placement, s, sites in placement_stats(name))])
    limits = (
        'A starting point for fine-tuning. The ImageNet classes carry the biases of ImageNet-1k: objects and scenes as '
        'photographed for the web, with people and places unevenly shown. Whether attention improves accuracy on your '
        'data is for your own comparison with the plain DenseNet to tell. For research; in medicine, never for '
        'diagnosis.')
    data = ModelCardData(
        license='apache-2.0', library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *_TAGS],
        base_model=list(weights.values()) or None, datasets=['imagenet-1k'] if weights else None, model_name=name)
    return _card(
        data, name, f'A {densenet.replace("densenet", "DenseNet-")} with squeeze-and-excitation channel attention. '
        f'{start}', model, load, bool(weights), [], limits, '', metrics, comparison, '')


def finetune_card(
        repo_id: str,
        model: Any,
        label_names: List[str],
        data_config: Mapping[str, Any],
        recipe: Mapping[str, Any],
        trained: str,
        msld: bool,
        metrics: Optional[Dict[str, Any]] = None,
) -> ModelCard:
    """Make the card of a fine-tuned model.

    Args:
        repo_id: Where it is published, OWNER/NAME.
        model: The model, of any architecture, with its own pretrained_cfg.
        label_names: Names of the classes, empty if unknown.
        data_config: Its preprocessing.
        recipe: The run's options.
        trained: What is known of the training beyond its options.
        msld: The images are MSLD's.
        metrics: Measured metrics, see `timm_densese.metrics.read_metrics`.

    Returns:
        The card.
    """
    cfg: Any = model.pretrained_cfg
    arch = cfg['architecture']
    source, name = split_source(str(recipe.get('model') or ''))
    base = (name if source == 'hf-hub' else cfg.get('hf_hub_id')) if recipe.get('pretrained') else None
    start = f'`{base}`' if base else 'random weights' if recipe.get('pretrained') is False else 'weights not recorded'
    if recipe.get('pretrained_path') or recipe.get('initial_checkpoint') or source == 'local-dir':
        start = 'weights in a file of the author'
    classes = ', '.join(map(_plain, label_names)) or 'not recorded'
    limits = (
        'For research. Its scores hold for images like those it was tested on, taken by the same people in the same '
        'way; others need a test of their own. It has no class for anything else, and answers with one of its own '
        'whatever it is shown.')
    if msld:
        limits += (
            f' **It is no medical device and not for diagnosis.**\n\n{MSLD_TERMS}\n\n{MSLD_LIMITS}')
    else:
        limits += ' Where the images are medical: it is no medical device and not for diagnosis.'
    options = '\n'.join(f'- {name}: {_plain(recipe[name])}' for name in _RECIPE if recipe.get(name) not in (None, ''))
    training = f'Started from {start}. {trained}\n\n{options}'.strip()
    data = ModelCardData(
        **(MSLD_LICENSE if msld else {'license': cfg.get('license') or 'apache-2.0'}),
        library_name='timm', pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *(_TAGS if arch in default_cfgs else ()), *(['medical'] if msld else [])],
        base_model=base, datasets=['imagenet-1k'] if base else None, model_name=repo_id.split('/')[-1],
        eval_results=_eval_results(metrics))
    meta = copy.deepcopy(model).to('meta')
    meta.pretrained_cfg = {**cfg, 'input_size': data_config['input_size']}
    return _card(
        data, repo_id.split('/')[-1],
        f'{_describe(model)}, fine-tuned to {model.num_classes} classes: {classes}.', meta, f'hf-hub:{repo_id}',
        True, label_names, limits, training, metrics, '', MSLD_CITATION if msld else '')


def _describe(model: Any) -> str:
    arch = model.pretrained_cfg['architecture']
    base = model._model_args.get('base')
    return (f'`{arch}`, a DenseNet with squeeze-and-excitation channel attention' if arch in default_cfgs else
            f'`{base}` of timm with channel attention' if base else f'`{arch}`')


def _plain(value: Any, length: int = 200) -> str:
    """Text as it is, in one line, that cannot become a heading, a link or HTML in a card."""
    text = ' '.join(str(value).split())
    # Control characters, and those that turn the direction of writing; not the joiners that scripts need.
    text = ''.join(c for c in text if unicodedata.category(c)[0] != 'C' or c in '\u200c\u200d')[:length]
    text = re.sub(r'[\\`*\[\]|~#$!{}]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.', r'\\\g<0>', text, flags=re.IGNORECASE)
    return html.escape(text, quote=False)


def _eval_results(metrics: Optional[Dict[str, Any]]) -> Optional[List[EvalResult]]:
    if not metrics:
        return None
    return [EvalResult(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=metrics['dataset']['name'],
        dataset_split=metrics['dataset'].get('split'), metric_type=_METRIC_TYPES.get(name, name), metric_name=name,
        metric_value=round(metric['value'], 4)) for name, metric in metrics['metrics'].items()]


def _results(metrics: Optional[Dict[str, Any]], name: str) -> str:
    if not metrics:
        return 'Accuracy: not measured.'
    dataset = metrics['dataset']
    images = ', '.join(filter(None, [
        _plain(dataset['name']), dataset.get('split') and f'{_plain(dataset["split"])} split',
        dataset.get('images') and f'{dataset["images"]} images',
        dataset.get('groups') and f'{dataset["groups"]} patients or groups']))
    tables = {name: metrics['metrics'], **metrics.get('comparison', {})}
    names = list(metrics['metrics'])
    lines = ['|model|' + '|'.join(map(_plain, names)) + '|', '|---|' + '---|' * len(names)]
    lines += [f'|{_plain(what)}|' + '|'.join(format_metric(table[n]) if n in table else '' for n in names) + '|'
              for what, table in tables.items()]
    notes = [f'Measured by `{metrics["command"]}` on {images}.', _plain(metrics.get('conditions') or '', 5000),
             f'In brackets: {metrics["interval"]}.' if metrics.get('interval') else '']
    return ' '.join(filter(None, notes)) + '\n\n' + '\n'.join(lines)


def _features(model: Any, size: Sequence[int]) -> Tuple[str, List[Sequence[int]]]:
    """The options of `features_only` and the shapes that it gives; none where the network gives no features."""
    image = torch.empty(1, *size, device='meta')
    if isinstance(model, DenseNet):
        maps: Any = model.forward_intermediates(image, intermediates_only=True)
        shapes = [o.shape for o in maps]
        # timm takes the first five feature maps unless told otherwise.
        return ', features_only=True' + (f', out_indices={(*range(len(shapes)),)}' if len(shapes) != 5 else ''), shapes
    try:
        net: Any = timm.create_model(
            model.pretrained_cfg['architecture'], device='meta', features_only=True, **model._model_args)
        return ', features_only=True', [o.shape for o in net.eval()(image)]
    except Exception:  # timm's constructors raise whatever they meet
        return '', []


def _card(
        data: ModelCardData,
        name: str,
        description: str,
        model: Any,
        load: str,
        pretrained: bool,
        label_names: List[str],
        limits: str,
        training: str,
        metrics: Optional[Dict[str, Any]],
        comparison: str,
        citation: str,
) -> ModelCard:
    cfg = model.pretrained_cfg
    size = cfg['input_size']
    stats = model_stats(model)
    module = timm.model_entrypoint(cfg['architecture']).__module__.split('.')[0]  # of this package, timm or the user
    register = '' if module == 'timm' else f'import {module}  # registers the models\n'
    install = 'pip install timm' + {
        'timm': '', 'timm_densese': '\npip install .  # in a clone of timm-densese; it needs Python 3.10 or newer'}.get(
            module, f'\n# and the module {module}, which its author has')
    features_only, shapes = _features(model, size)
    shown = '\n'.join(f'    #  torch.Size({list(shape)})' for shape in shapes)
    top_k = _TOP_K.format(k=min(5, model.num_classes)) + (_LABELS if label_names else '')
    usage = '\n\n'.join(
        _SNIPPET.format(title=title, load=load, pretrained=pretrained, option=option, then=then, register=register)
        for title, option, then in (
            ('Image Classification', ')', top_k),
            ('Feature Map Extraction', f'{features_only})', _FEATURES.format(shapes=shown) if shapes else ''),
            ('Image Embeddings', ', num_classes=0)  # remove classifier nn.Linear',
             _EMBEDDING.format(num_features=model.num_features))) if then)
    sections = [
        f'# Model card for {name}', description,
        '## Model Details\n'
        '- **Model Type:** Image classification / feature backbone\n'
        '- **Model Stats:**\n'
        f'  - Params (M): {stats["params"]:.1f}\n'
        f'  - GMACs: {stats["macs"] / 1e3:.1f}\n'
        f'  - Activations (M): {stats["activations"]:.1f}\n'
        f'  - Image size: {size[1]} x {size[2]}\n'
        + (f'- **Papers:**\n  {_PAPERS}\n' if cfg['architecture'] in default_cfgs else '')
        + ('- **Needs:** the package timm-densese, imported as `timm_densese`, beside timm' if module == 'timm_densese'
           else '- **Needs:** timm' if module == 'timm' else f'- **Needs:** the module {module}, beside timm'),
        f'## Model Usage\n### Installation\n```bash\n{install}\n```\n\n{usage}',
        f'## Intended Use and Limits\n{limits}',
        f'## Training\n{training}' if training else '',
        f'## Results\n{_results(metrics, name)}',
        f'## Model Comparison\n{comparison}' if comparison else '',
        f'## Citation\n{_CITATION}{citation}',
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n' + '\n\n'.join(filter(None, sections)) + '\n')
