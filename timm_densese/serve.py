"""A local web page to try a model: a prediction, what it looks at, and what its gates do."""
import os
import socket
import sys
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
from PIL import Image

from .checkpoints import Model, load_model, short_name
from .data.images import read_image
from .errors import CheckpointError, UserError
from .explain import draw_gates, grad_cam, overlay, read_gates
from .predict import check_logits, create_image_transform
from .report import FONTS, STYLE
from .thresholds import name_call, read_calibration

__all__ = ['create_page', 'serve']

NOTICE = ('This is no medical device. For research and teaching: its answers are not for diagnosis. Images stay on '
          'this computer.')
MAX_MEGABYTES, MAX_MEGAPIXELS = 10, 40
_TOP_K = 5
_SITES_SHOWN = 3


def create_page(model: Model, calibration: Optional[Path] = None, device: str = '') -> Any:
    """Create the page.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes, or what it returned.
        calibration: metrics.json of `timm-densese evaluate`, for calibrated probabilities.
        device: Device, by default CUDA where there is one.

    Returns:
        A gradio.Blocks.

    Raises:
        UserError: The model cannot be loaded.
    """
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')  # a page about patients tells nobody
    import gradio as gr

    loaded = load_model(model, device)
    use = read_calibration(calibration, loaded.hash_weights(), loaded.class_names)
    net = loaded.model
    names = loaded.class_names
    transform = create_image_transform(loaded.data_config)
    has_gates = bool(getattr(net, 'attn_sites', None))

    def answer(file: Optional[str]) -> Tuple[Any, Any, Any, str]:
        if not file:
            raise gr.Error('Choose an image first.')
        try:
            with Image.open(file) as opened:
                pixels = opened.width * opened.height
            if pixels > 1e6 * MAX_MEGAPIXELS:
                raise gr.Error(f'This image has {pixels / 1e6:.0f} megapixels; at most {MAX_MEGAPIXELS} are read.')
            photo = read_image(file)
            image = transform(photo)[None].to(loaded.device)
        except gr.Error:
            raise
        except Exception as e:  # PIL's decoders raise whatever they meet
            raise gr.Error(f'This file cannot be read as an image ({type(e).__name__}: {e}).') from e
        with torch.inference_mode():
            logits = net(image)
        try:
            check_logits(logits, loaded, [Path(file)])
        except CheckpointError as e:
            raise gr.Error(str(e)) from e
        probabilities = (logits.double() / use.temperature).softmax(1)[0].tolist()
        cam = overlay(photo, grad_cam(net, image)[0], loaded.data_config)
        figure = None
        if has_gates:
            gates = read_gates(net, image)
            figure = draw_gates({site: {'this image': values[0].numpy()} for site, values in
                                 list(gates.items())[-_SITES_SHOWN:]})
        said = ''
        if use.thresholds:
            probability = probabilities[names.index(use.thresholds.positive)]
            said = f'At the threshold of the calibration: **{name_call(probability, use.thresholds, names)}**'
        return dict(zip(names, probabilities, strict=True)), cam, figure, said

    with gr.Blocks(title='timm-densese', analytics_enabled=False) as page:
        gr.HTML(f'<div class="warning">{NOTICE}</div>')
        gr.Markdown(f'# What {short_name(loaded.source)} makes of an image')
        with gr.Row():
            with gr.Column():
                file = gr.File(label=f'Image, at most {MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} megapixels',
                               file_types=['image'], type='filepath', elem_id='upload')
                button = gr.Button('Predict', variant='primary', elem_id='predict')
            with gr.Column():
                label = gr.Label(num_top_classes=_TOP_K, elem_id='prediction', label=(
                    'Prediction, calibrated' if use.is_fitted else 'Prediction, probabilities not calibrated'))
                called = gr.Markdown(visible=use.thresholds is not None)
                cam = gr.Image(label='What it looked at (Grad-CAM)', interactive=False, height=300, elem_id='cam')
        gr.Markdown('### Gates of the channels\nA gate multiplies one channel. At 1 it leaves the channel as it is, at '
                    '0 it shuts it off, at 2 it doubles it.', visible=has_gates)
        gates = gr.Plot(show_label=False, visible=has_gates, elem_id='gates')
        button.click(answer, file, [label, cam, gates, called])
    return page


def serve(
        model: Model,
        calibration: Optional[Path] = None,
        device: str = '',
        port: int = 7860,
        host: str = '127.0.0.1',
) -> None:
    """Open the page, until it is interrupted.

    Args:
        model: What `timm_densese.checkpoints.load_model` takes, or what it returned.
        calibration: metrics.json of `timm-densese evaluate` or `timm-densese study`.
        device: Device, by default CUDA where there is one.
        port: Port.
        host: Address to listen on, 0.0.0.0 for all of this computer's: in a container, for example.

    Raises:
        UserError: The model cannot be loaded, or the port is taken.
    """
    local = host in ('127.0.0.1', 'localhost')
    if not local:
        print(f'WARNING: --host {host} opens the page to everybody who reaches this computer, without a password and '
              f'unencrypted.', file=sys.stderr)
    try:
        with socket.socket() as free:  # as gradio will try, once the model is loaded
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((host, port))
    except OSError as e:
        raise UserError(
            f'Port {port} of {host} cannot be opened ({e.strerror}). Choose another --port, or --host.') from e
    page = create_page(model, calibration, device)
    from gradio.themes import Base
    print(NOTICE)
    for name in ('no_proxy', 'NO_PROXY'):  # gradio asks its own page whether it is there
        os.environ[name] = ','.join(filter(None, [os.environ.get(name), '127.0.0.1', 'localhost', host]))
    try:
        page.launch(server_name=host, server_port=port, max_file_size=f'{MAX_MEGABYTES}mb', inbrowser=local, css=STYLE,
                    theme=Base(primary_hue='blue', neutral_hue='slate', font=FONTS, font_mono=FONTS))
    except OSError as e:
        raise UserError(f'Port {port} of {host} cannot be opened ({e}). Choose another --port.') from e
