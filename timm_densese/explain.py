"""What a model looks at, and what its gates do.

Papers:
    * `Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization` -
      https://arxiv.org/abs/1610.02391
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507 (its figure of mean gates by class)
"""
import csv
import json
import math
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from .checkpoints import Checkpoint, Model, load_model, short_name
from .data.images import find_images, read_image
from .errors import CheckpointError, ImagesError
from .figures import figure_style
from .files import check_new_folder, new_folder
from .models.attention import IdentityGate
from .predict import check_logits, load_batches
from .report import Overlay, write_explanation

__all__ = ['draw_gates', 'explain', 'grad_cam', 'overlay', 'read_gates']

_SATURATED, _DEAD = 1.9, .1  # a gate lies between 0 and 2, and 1 leaves its channel as it is
_SITES_SHOWN = 9
_MAX_SIDE = 1024


def grad_cam(model: Any, images: torch.Tensor, classes: Optional[Sequence[int]] = None) -> np.ndarray:
    """Compute Grad-CAM on the final feature map: what the pooling before the classifier sees.

    Args:
        model: A DenseNet or SE-DenseNet in eval mode, fused or not, or another net of timm. Of a transformer, the map
            is that of its patches before the last block, which reads them all.
        images: (B, C, H, W).
        classes: Class to explain for each image, by default the most probable.

    Returns:
        Maps (B, H, W) from 0 to 1.

    Raises:
        CheckpointError: The net has no feature map that Grad-CAM could be drawn of.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def as_map(features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else features
        patches = features[:, getattr(model, 'num_prefix_tokens', 0):]
        height = round((patches.shape[1] * images.shape[2] / images.shape[3]) ** .5)
        return patches.transpose(1, 2).unflatten(2, (height, -1))

    targets = None if classes is None else [ClassifierOutputTarget(i) for i in classes]
    try:
        with torch.enable_grad(), GradCAM(model, [_last_features(model)], as_map) as cam:
            return cam(input_tensor=images, targets=targets)
    except Exception as e:  # features of a shape that is not known, or none at all
        raise CheckpointError(f'Grad-CAM cannot be drawn for {type(model).__name__} ({type(e).__name__}: {e}).') from e


def _last_features(model: Any) -> nn.Module:
    features, blocks = getattr(model, 'features', None), list(getattr(model, 'blocks', ()))
    if isinstance(features, nn.Sequential):
        return features
    if getattr(model, 'num_prefix_tokens', 0) and blocks and hasattr(blocks[-1], 'norm1'):
        return blocks[-1].norm1  # after the last block, only the class token counts
    return model.get_submodule(model.feature_info[-1]['module'])


def overlay(photo: Image.Image, cam: np.ndarray, data_config: Dict[str, Any]) -> Image.Image:
    """Draw a map over a photo, where the model saw it.

    Args:
        photo: The photo, as `timm_densese.data.images.read_image` gives it.
        cam: Map of the model's input, (H, W), from 0 to 1.
        data_config: Preprocessing, which tells what part of the photo the input is.

    Returns:
        The photo beside the photo with the map, at the photo's size, where its longer side is at most 1024 pixels.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image

    left, top, right, bottom = _seen(photo.size, data_config)
    scale = min(1., _MAX_SIDE / max(photo.size))
    small = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))),
                         Image.Resampling.LANCZOS) if scale < 1 else photo
    pixels = np.asarray(small.convert('RGB'))
    # Of the map, what lies on the photo; of the photo, what the map covers.
    x = _pixels(left * scale, right * scale, small.width)
    y = _pixels(top * scale, bottom * scale, small.height)
    part = ((x.start / scale - left) / (right - left) * cam.shape[1], (y.start / scale - top) / (bottom - top) *
            cam.shape[0], (x.stop / scale - left) / (right - left) * cam.shape[1],
            (y.stop / scale - top) / (bottom - top) * cam.shape[0])
    part = tuple(np.clip(part, 0, [cam.shape[1], cam.shape[0]] * 2))
    heat = Image.fromarray(cam.astype(np.float32)).resize(
        (x.stop - x.start, y.stop - y.start), Image.Resampling.BILINEAR, box=part)
    drawn = pixels.copy()
    drawn[y, x] = show_cam_on_image(pixels[y, x].astype(np.float32) / 255, np.asarray(heat), use_rgb=True)
    return Image.fromarray(np.hstack([pixels, drawn]))


def _seen(size: Tuple[int, int], data_config: Dict[str, Any]) -> Tuple[float, float, float, float]:
    """The box of a photo of a size (W, H) that timm's transform makes the input of; it may reach beyond the photo."""
    _, height, width = data_config['input_size']
    # Photo pixels for each pixel of the resized photo, from which the input is cut.
    by_height = size[1] / math.floor(height / data_config['crop_pct'])
    by_width = size[0] / math.floor(width / data_config['crop_pct'])
    if data_config['crop_mode'] != 'squash':
        by_height = by_width = (max if data_config['crop_mode'] == 'border' else min)(by_height, by_width)
    half_width, half_height = width * by_width / 2, height * by_height / 2
    return (size[0] / 2 - half_width, size[1] / 2 - half_height, size[0] / 2 + half_width, size[1] / 2 + half_height)


@contextmanager
def _recorded_gates(model: Any) -> Iterator[Dict[str, torch.Tensor]]:
    """Record the gates of each attention, (B, C), in the forward passes inside."""
    gates: Dict[str, torch.Tensor] = {}
    read: Dict[str, List[torch.Tensor]] = {name: [] for name in model.attn_sites}

    def record_gate(module: nn.Module, args: Any, output: torch.Tensor, name: str) -> None:
        read[name].append(output.double().flatten(1).cpu())

    def record(module: nn.Module, args: Any, output: torch.Tensor, name: str) -> None:
        x, y = args[0].double(), output.double()
        power = (x * x).sum((2, 3))
        # Without one gate a channel: the factor from input to output, by least squares over the positions. What is
        # zero everywhere is left as it is.
        factor = torch.where(power > 0, (x * y).sum((2, 3)) / power.clamp_min(1e-300), 1.).cpu()
        one_gate = len(read[name]) == 1 and read[name][0].shape == factor.shape
        gates[name] = read[name][0] if one_gate else factor
        read[name].clear()

    handles = []
    for name in model.attn_sites:
        attn = model.get_submodule(name)
        handles.append(attn.register_forward_hook(partial(record, name=name)))
        if isinstance(getattr(attn, 'gate', None), IdentityGate):
            handles.append(attn.gate.register_forward_hook(partial(record_gate, name=name)))
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def read_gates(model: Any, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Read what each attention multiplies its channels by.

    Args:
        model: A model with attention of this package in eval mode, not fused.
        images: (B, C, H, W).

    Returns:
        Gates (B, channels) in float64 by the attention's name in the model, 1 where a channel is left as it is. For
        attentions with a gate for each position, its mean, weighted by the squared features.
    """
    with _recorded_gates(model) as gates:
        model(images)
    return gates


def explain(
        model: Model,
        images: Sequence[str],
        output: Path,
        before: str = '',
        device: str = '',
        batch_size: int = 16,
) -> Dict[str, Any]:
    """Write Grad-CAM overlays and the excitation profiles of a model, and a page that shows them.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes.
        images: Files, folders and patterns. Where a folder above an image is named as a class, that is its class; the
            others count for the class that the model gives them.
        output: Folder to write, which must not exist or be empty: explanation.html (needs no network), cam/ with an
            overlay for each image, and for models with attention of this package excitation.csv (site, channel, class,
            mean gate), excitation.json (by site: eta squared, saturated and dead gates) and excitation.png.
        before: The model before fine-tuning, to draw its gates, too.
        device: Device, by default CUDA where there is one.
        batch_size: Images a batch.

    Returns:
        What excitation.json holds: `sites`, none for a model without attention; and `unreadable`, the files that could
        not be read, with the reason.

    Raises:
        ImagesError: There are no images, or none can be read.
        UserError: A model cannot be loaded, or `output` is not empty.
    """
    import pytorch_grad_cam  # noqa: F401  it is missed before there is work to lose

    check_new_folder(output, '--output')
    paths = find_images(images)
    loaded = load_model(model, device)
    earlier = load_model(before, device) if before else None
    sites = list(getattr(loaded.model, 'attn_sites', {}))
    if earlier and list(getattr(earlier.model, 'attn_sites', {})) != sites:
        raise ImagesError(f'{before} has its attention in other places than {loaded.source}.')
    if earlier and _of_another_kind(earlier, loaded):
        raise ImagesError(f'{before} is another net than {loaded.source}, or takes other images: its gates cannot be '
                          f'held against them. Give what the training began from.')
    names = loaded.class_names

    with new_folder(output) as work:
        (work / 'cam').mkdir()
        labels: List[int] = []
        overlays: List[Overlay] = []
        unreadable: Dict[str, str] = {}
        gates: Dict[str, List[torch.Tensor]] = {site: [] for site in sites}
        gates_before: Dict[str, List[torch.Tensor]] = {site: [] for site in sites}
        for places, batch, errors in load_batches(paths, loaded.data_config, batch_size, desc='explain'):
            for place, error in errors.items():
                unreadable[str(paths[place])] = error
                print(f'not readable: {paths[place]} ({error})', file=sys.stderr)
            if not places:
                continue
            batch = batch.to(loaded.device)
            with torch.inference_mode():
                logits = check_logits(loaded.model(batch).float(), loaded, [paths[place] for place in places])
            probabilities = logits.softmax(1)
            called = probabilities.argmax(1).tolist()
            for place, prediction in zip(places, called, strict=True):
                above = (names.index(folder.name) for folder in paths[place].parents if folder.name in names)
                labels.append(next(above, prediction))
            for cam, place, prediction, p, label in zip(
                    grad_cam(loaded.model, batch, called), places, called, probabilities, labels[-len(places):],
                    strict=True):
                stem = os.fsencode(paths[place].stem)[:120].decode('utf-8', 'ignore')  # a file system counts bytes
                name = f'{place:05}-{stem}-{_file_name(names[prediction])}.png'
                overlay(read_image(paths[place]), cam, loaded.data_config).save(work / 'cam' / name)
                overlays.append(Overlay(names[label], names[prediction], p[prediction].item(), f'cam/{name}'))
            if sites:
                _append(gates, loaded, batch)
                if earlier:
                    _append(gates_before, earlier, batch)
        if not labels:
            raise ImagesError(f'None of the {len(paths)} images can be read.')
        profile: Dict[str, Any] = {'sites': {}, 'unreadable': unreadable}
        if sites:
            joined = {site: torch.cat(values).numpy() for site, values in gates.items()}
            joined_before = {site: torch.cat(values).numpy() for site, values in gates_before.items() if values}
            profile.update(_profile(joined, joined_before, np.array(labels), names))
            _write_profile(work, profile, joined, joined_before, np.array(labels), names)
        gates_figure = (work / 'excitation.png').read_bytes() if sites else None
        write_explanation(work / 'explanation.html', short_name(loaded.source), overlays, profile, gates_figure)
    print(f'{output / "explanation.html"} shows it; {len(labels)} overlays are in {output / "cam"}.')
    if not sites:
        print(f'{loaded.source} has no attention of this package, so there is no excitation to show.')
    for site, row in list(profile['sites'].items())[:_SITES_SHOWN]:
        print(f'{site}: eta squared {row["eta_squared"]:.3f}, gates {row["mean"]:.3f} on average, '
              f'{row["saturated"]} saturated and {row["dead"]} dead of {row["channels"]}')
    return profile


def _append(gates: Dict[str, List[torch.Tensor]], loaded: Checkpoint, images: torch.Tensor) -> None:
    for site, values in read_gates(loaded.model, images).items():
        gates[site].append(values)


def _pixels(start: float, stop: float, size: int) -> slice:
    """Give the pixels between two places on a side of so many, one at least."""
    first = min(max(0, round(start)), size - 1)
    return slice(first, max(first + 1, min(size, round(stop))))


def _of_another_kind(one: Checkpoint, other: Checkpoint) -> bool:
    """Tell whether two nets differ by more than classes and values, or take images normalised in other ways."""
    def kind(loaded: Checkpoint) -> Any:
        head = loaded.model.pretrained_cfg.get('classifier') or ()
        shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()
                  if not name.startswith(head if isinstance(head, str) else tuple(head))}
        return shapes, *(list(loaded.data_config[key]) for key in ('mean', 'std'))

    return kind(one) != kind(other)


def _file_name(label: str) -> str:
    return ''.join(c if c.isalnum() else '_' for c in label)[:40]


def _profile(
        gates: Dict[str, np.ndarray],
        before: Dict[str, np.ndarray],
        labels: np.ndarray,
        names: Sequence[str],
) -> Dict[str, Any]:
    """Sites by eta squared, the share of a gate's variance that lies between classes, on average over the channels."""
    found: Dict[str, Any] = {}
    for site, values in gates.items():
        mean = values.mean(0)
        total = ((values - mean) ** 2).sum(0)
        between = sum((labels == i).sum() * (values[labels == i].mean(0) - mean) ** 2 for i in np.unique(labels))
        share = np.divide(between, total, out=np.zeros_like(total), where=total > 1e-12)
        found[site] = {
            'channels': len(mean), 'mean': float(mean.mean()), 'eta_squared': float(share.mean()),
            'best_channel': int(share.argmax()), 'best_eta_squared': float(share.max()),
            'saturated': int((mean > _SATURATED).sum()), 'dead': int((mean < _DEAD).sum())}
        if site in before:
            moved = mean - before[site].mean(0)
            found[site].update(mean_before=float(before[site].mean()), moved=float(np.abs(moved).mean()))
    return {
        'images': {names[i]: int((labels == i).sum()) for i in np.unique(labels)},
        'saturated_above': _SATURATED, 'dead_below': _DEAD,
        'sites': dict(sorted(found.items(), key=lambda item: -item[1]['eta_squared']))}


def _write_profile(
        work: Path,
        profile: Dict[str, Any],
        gates: Dict[str, np.ndarray],
        before: Dict[str, np.ndarray],
        labels: np.ndarray,
        names: Sequence[str],
) -> None:
    text = json.dumps(profile, indent=1, ensure_ascii=False, allow_nan=False)
    (work / 'excitation.json').write_text(text, encoding='utf-8')
    with open(work / 'excitation.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['site', 'channel', 'class', 'mean_gate', *(['mean_gate_before'] if before else [])])
        for site, values in gates.items():
            for i in np.unique(labels):
                now = values[labels == i].mean(0)
                then = [before[site][labels == i].mean(0)] if before else []
                writer.writerows([site, channel, names[i], *row] for channel, row in enumerate(
                    zip(now, *then, strict=True)))
    shown = list(profile['sites'])[:_SITES_SHOWN]
    figure = draw_gates(
        {site: {names[i]: gates[site][labels == i].mean(0) for i in np.unique(labels)} for site in shown},
        {site: before[site].mean(0) for site in shown if site in before})
    figure.savefig(work / 'excitation.png', dpi=100)


def draw_gates(gates: Dict[str, Dict[str, np.ndarray]], before: Optional[Dict[str, np.ndarray]] = None) -> Any:
    """Draw the gates of each channel, a panel a site and a line a class, as the SE paper does; one class as bars.

    Args:
        gates: For each site, for each class, its gates (channels,).
        before: For each site, the gates before fine-tuning.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(gates))
    rows = -(-len(gates) // columns)
    classes = list(next(iter(gates.values())))
    with figure_style(classes) as names:
        figure = Figure(figsize=(4.2 * columns + .8, 2.6 * rows), layout='constrained')
        axes: Any = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(gates):]:
            ax.set_axis_off()
        for ax, (site, by_class) in zip(axes.flat, gates.items(), strict=False):
            if before and site in before:
                ax.plot(before[site], color='gray', lw=1, label='before')
            ax.axhline(1, color='black', lw=.8, ls=':', label='1: left as it is')
            for name, values in zip(names, by_class.values(), strict=True):
                if len(classes) == 1:
                    ax.bar(range(len(values)), values - 1, bottom=1, width=1, label=name)
                else:
                    ax.plot(values, lw=.8, label=name)
            ax.set(title=site, xlabel='channel', ylabel='mean gate', ylim=(0, 2))
            ax.title.set_fontsize(9)
        axes.flat[0].legend(fontsize=7)
    return figure
