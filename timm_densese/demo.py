"""The whole path on one machine in minutes: weights, transfer, fine-tuning, checkpoint, prediction."""
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform, resolve_data_config
from timm.utils import CheckpointSaver, random_seed

from .data import generate_images, hold_out, patient_of
from .training import evaluate, fine_tune

__all__ = ['run_demo']

MODEL, DENSENET = 'se_densenet121', 'densenet121'
HUB_FILE = (f'timm/{DENSENET}.ra_in1k', 'model.safetensors')
IMG_SIZE, BATCH_SIZE, EPOCHS, LR = 128, 16, 5, 1e-3


def _weights_available() -> bool:
    """Look for the weights with one short request: the download itself retries for 45 seconds before it gives up."""
    if isinstance(try_to_load_from_cache(*HUB_FILE), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(*HUB_FILE), timeout=10)
    except Exception as e:  # no network, no DNS, a proxy's page: whatever it is, the demo goes on without
        print(f'The Hugging Face Hub could not be reached ({type(e).__name__}: {e}).')
        return False
    return True


def run_demo(data: Optional[Path], output: Path) -> None:
    """Fine-tune se_densenet121 for a few epochs at a small size, and use what comes out.

    Args:
        data: Folder with a folder of images for each class, or None for a small generated set.
        output: Folder that gets the checkpoints, and the generated set.

    Raises:
        ValueError: `data` does not hold two classes of images.
    """
    random_seed(0)

    # Images, split so that no patient is on both sides.
    if data is None:
        data = output / 'generated'
        generate_images(data)
        print(f'No images were given, so these are GENERATED: spots and stripes, in {data}.')
    train_set, val_set = ImageDataset(str(data)), ImageDataset(str(data))
    classes = list(train_set.reader.class_to_idx)
    if len(classes) < 2:
        raise ValueError(f'{data} must hold a folder of images for each of two or more classes; found {classes}.')
    samples = train_set.reader.samples
    patients = [patient_of(path) for path, _ in samples]
    train, held_out = hold_out([label for _, label in samples], patients, fraction=0.2, seed=0)
    train_set.reader.samples = [samples[i] for i in train]
    val_set.reader.samples = [samples[i] for i in held_out]
    print(f'{len(samples)} images of {" and ".join(classes)} in {data}: {len(train)} to train on, {len(held_out)} held '
          f'out ({len(set(patients))} patients, none on both sides).')

    # A DenseNet's weights, transferred.
    pretrained = _weights_available()
    densenet: Any = timm.create_model(DENSENET, pretrained=pretrained).eval()
    model: Any = timm.create_model(
        MODEL, pretrained=True, pretrained_cfg_overlay=dict(state_dict=densenet.state_dict()),
        num_classes=len(classes)).eval()
    config = resolve_data_config({'input_size': (3, IMG_SIZE, IMG_SIZE)}, model=model)
    with torch.inference_mode():
        image = torch.randn(1, *config['input_size'])
        expected, features = densenet.forward_features(image), model.forward_features(image)
    error = ((features - expected).norm() / expected.norm()).item()
    print(f'{DENSENET} has {"ImageNet" if pretrained else "RANDOM"} weights; transferred to {MODEL}, they give the '
          f'same features up to {error:.0e}.')

    # Fine-tuning.
    common = dict(
        input_size=config['input_size'], batch_size=BATCH_SIZE, mean=config['mean'], std=config['std'],
        interpolation=config['interpolation'], num_workers=0, use_prefetcher=False)
    train_loader = create_loader(train_set, is_training=True, **common)
    val_loader = create_loader(val_set, is_training=False, crop_pct=config['crop_pct'], **common)
    model.to(memory_format=torch.channels_last)
    checkpoints = output / 'checkpoints'
    checkpoints.mkdir(parents=True, exist_ok=True)
    before = evaluate(model, val_loader)
    optimizer = fine_tune(model, train_loader, val_loader, EPOCHS, LR)
    after = evaluate(model, val_loader)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(checkpoints)).save_checkpoint(EPOCHS - 1, after)
    print(f'Accuracy on the {len(held_out)} held-out images: {before:.1f}% before, {after:.1f}% after {EPOCHS} epochs'
          f'{"" if pretrained else " from random weights"}.')

    # The checkpoint, used.
    checkpoint = checkpoints / 'last.pth.tar'
    print(f'Checkpoint: {checkpoint}')
    loaded = timm.create_model(MODEL, num_classes=len(classes), checkpoint_path=str(checkpoint)).eval()
    path, label = samples[held_out[0]]
    with torch.inference_mode(), Image.open(path) as file:
        transform: Any = create_transform(**config)
        probability, index = loaded(transform(file.convert('RGB'))[None]).softmax(1).max(1)
    print(f'Reloaded, it says of {path}: {classes[index.item()]} ({probability.item():.0%}). The label is '
          f'{classes[label]}.')
