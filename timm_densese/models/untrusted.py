"""What somebody else wrote (a config.json, a checkpoint) is checked here before memory is taken for it.

No code from a repository is ever run: models are this package's, weights are safetensors, and a pickle is read only if
it holds nothing but tensors, plain values and an argparse.Namespace.
"""
import argparse
import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import CheckpointFileError, ModelConfigError, UserError

__all__ = ['check_checkpoint_file', 'check_model_args', 'check_net_args', 'check_source', 'read_checkpoint']

_MAX_PARAMETERS = 2 ** 30  # 15 times se_densenet264d
_MAX_MODULES = 10_000  # ten times se_densenet264d
_MAX_PIXELS = 2 ** 24  # numbers in one image


def _whole(low: int, high: int) -> Any:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _real(v: Any) -> bool:
    return isinstance(v, (int, float)) and 0 <= v <= 1


def _text(v: Any) -> bool:
    return isinstance(v, str) and len(v) <= 64


def _flag(v: Any) -> bool:
    return isinstance(v, bool)


# The arguments of SEDenseNet that JSON can hold, and what their values may be. Far above what is useful, and low
# enough that a model of these sizes is counted, on the meta device, in no time.
_MODEL_ARGS = {
    'growth_rate': _whole(1, 1024),
    'block_config': lambda v: (isinstance(v, (list, tuple)) and 1 <= len(v) <= 8 and all(map(_whole(1, 512), v))
                               and sum(v) <= 512),
    'num_classes': _whole(0, 2 ** 20),
    'in_chans': _whole(1, 1024),
    'bn_size': _whole(1, 64),
    'rd_channels': _whole(1, 2 ** 16),
    'rd_ratio': _real,
    'drop_rate': _real,
    'proj_drop_rate': _real,
    'memory_efficient': _flag,
    'aa_stem_only': _flag,
    'se_placement': _text,
    'attn_layer': _text,
    'gate_layer': _text,
    'global_pool': _text,
    'stem_type': _text,
    'act_layer': _text,
    'norm_layer': _text,
}


def check_model_args(arch: str, args: Mapping[str, Any]) -> None:
    """Check a model's arguments that came from a file.

    Args:
        arch: Name of the model, for the message.
        args: Arguments by name.

    Raises:
        ModelConfigError: An argument is not one of SEDenseNet's, or its value is absurd.
    """
    unknown = sorted(str(name)[:64] for name in args if name not in _MODEL_ARGS)
    absurd = sorted(f'{name}={value!r:.64}' for name, value in args.items()
                    if name in _MODEL_ARGS and value is not None and not _MODEL_ARGS[name](value))
    if unknown or absurd:
        raise ModelConfigError(
            f'The arguments for {arch} that a file gives are refused, nothing was built from them:'
            + (f' {", ".join(unknown)} is not an argument of this model.' if unknown else '')
            + (f' {", ".join(absurd)} is out of range.' if absurd else '')
            + ' Ask whoever published it, or create the model yourself and load the weights with checkpoint_path.')


# Arguments of any network that are not its own: where weights come from, and where they go.
_NOT_NET_ARGS = re.compile(
    r'pretrained|checkpoint_path|cache_dir|device|dtype|scriptable|exportable|no_jit|features_only|out_indices|'
    r'feature_cls|pruned|kwargs_filter')


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 64 and sum(v if isinstance(v, int) else 1 for v in value) <= 2 ** 14 and all(
            map(_is_plain, value))
    if isinstance(value, dict):
        return len(value) <= 16 and all(map(_text, value)) and all(map(_is_plain, value.values()))
    return value is None or _flag(value) or _text(value) or _whole(0, 2 ** 20)(value) or (
        isinstance(value, float) and abs(value) < 2 ** 20)


def check_net_args(arch: str, args: Mapping[str, Any]) -> None:
    """Check the arguments of any network of timm that came from a file.

    Args:
        arch: Name of the model, for the message.
        args: Arguments by name.

    Raises:
        ModelConfigError: An argument is none of a network's, or its value is not plain or absurd.
    """
    refused = sorted(f'{name}={value!r}'[:80] for name, value in args.items()
                     if _NOT_NET_ARGS.match(str(name)) or not _is_plain(value))
    if refused:
        raise ModelConfigError(
            f'The arguments for {arch} that a file gives are refused, nothing was built from them: '
            f'{", ".join(refused)} is not taken from a file. Ask whoever published it, or create the model '
            f'yourself and load the weights with checkpoint_path.')


def check_source(arch: str, cfg: Dict[str, Any], create: Callable[[], nn.Module]) -> None:
    """Check what a config.json, from a repository or a folder, describes, before memory is taken for it.

    Args:
        arch: Name of the model, for the message.
        cfg: timm's pretrained cfg of it. It is changed, so that weights are taken as safetensors.
        create: Creates the model that is described, on the meta device.

    Raises:
        ModelConfigError: The model cannot be created, or is too large.
        CheckpointFileError: The folder holds a pickle that is refused.
    """
    modules = 0

    def count(module: nn.Module, name: str, child: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > _MAX_MODULES:  # also the meta device takes time for each
            raise ModelConfigError(
                f'The config.json for {arch} is refused: it describes more than {_MAX_MODULES} layers.')

    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = cfg.get(key)
        if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 3 and all(
                map(_whole(1, 2 ** 13), size)) and size[0] <= 1024 and math.prod(size) <= _MAX_PIXELS):
            raise ModelConfigError(f'The config.json for {arch} is refused: {key}={size!r:.80} is out of range.')
    handle = register_module_module_registration_hook(count)
    try:
        params = sum(p.numel() for p in create().parameters())
    except UserError:
        raise
    except Exception as e:  # timm's constructors raise whatever they meet
        raise ModelConfigError(
            f'The config.json for {arch} is refused: its arguments give no model ({type(e).__name__}: {e}).') from e
    finally:
        handle.remove()
    if params > _MAX_PARAMETERS:
        raise ModelConfigError(
            f'The config.json for {arch} is refused, nothing was built from it: it describes {params / 1e9:.1f} '
            f'billion parameters, {_MAX_PARAMETERS / 1e9:.1f} billion is the limit.')
    cfg['custom_load'] = False
    if cfg['source'] == 'hf-hub':
        cfg['hf_hub_filename'] = 'model.safetensors'  # never a pickle
    elif not (Path(cfg['file']) / 'model.safetensors').exists():
        for file in Path(cfg['file']).iterdir():
            if file.suffix in ('.bin', '.pth', '.tar'):
                check_checkpoint_file(file)


# All that torch.save writes for tensors, and timm's checkpoints besides.
_GLOBALS = re.compile(
    r'torch (\w+Storage|Size|device|(b?float|u?int|complex)\d+|bool)|torch\.storage (Untyped|Typed)Storage|'
    r'torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict|argparse Namespace')


def check_checkpoint_file(path: Path) -> None:
    """Check a pickled checkpoint without loading it.

    Args:
        path: File that torch.save wrote.

    Raises:
        CheckpointFileError: It is not such a file, is damaged, unpacks to more than it holds, or its pickle asks for
            anything but tensors and plain values.
    """
    def refuse(reason: str) -> CheckpointFileError:
        return CheckpointFileError(f'{path} is refused, nothing of it was loaded: {reason}')

    if not path.is_file():
        raise CheckpointFileError(f'{path}: there is no such file. Give a checkpoint of a training.')
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise refuse(
            f'its {size} bytes are not what torch.save writes. It is damaged, or older than torch 1.6: then load it '
            f'where you trust it and save it again.')
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise refuse(f'{packed[0]} is compressed, which torch.save never does: it may unpack to any size.')
        if sum(e.file_size for e in entries) > size:
            raise refuse(f'its parts claim {sum(e.file_size for e in entries)} bytes, the file has {size}.')
        pickles = [e for e in entries if e.filename.endswith('.pkl')]
        if len(pickles) != 1 or pickles[0].file_size > 64 << 20:
            raise refuse('it must hold one pickle of at most 64 MiB beside the tensors.')
        try:
            asked = {str(argument) for opcode, argument, _ in pickletools.genops(archive.read(pickles[0]))
                     if 'GLOBAL' in opcode.name or opcode.name == 'INST'}
        except (ValueError, zipfile.BadZipFile) as e:
            raise refuse(f'its pickle is damaged ({e}).') from e
    foreign = sorted(name for name in asked if not _GLOBALS.fullmatch(name))
    if foreign:
        raise refuse(
            f'its pickle needs {", ".join(n.replace(" ", ".") for n in foreign)}, which is more than tensors and plain '
            f'values: loading it could run code. If you trust it, load it with weights_only=False and save its '
            f'state_dict again.')


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a checkpoint of timm's train.py or of `timm-densese train`, or a bare state dict.

    Args:
        path: File that torch.save wrote.

    Returns:
        What was saved, tensors on the CPU and mapped from the file until they are used.

    Raises:
        CheckpointFileError: As `check_checkpoint_file`; or tensors in it claim more than the file holds.
    """
    check_checkpoint_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as e:  # the unpickler and the reader raise whatever they meet
        raise CheckpointFileError(f'{path} could not be read: {type(e).__name__}: {str(e).splitlines()[0]}') from e
    if not isinstance(checkpoint, dict):
        raise CheckpointFileError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint or state dict.')
    for state_dict in (checkpoint, *(v for v in checkpoint.values() if isinstance(v, dict))):
        tensors = [v for v in state_dict.values() if isinstance(v, torch.Tensor)]
        # A stride of 0 makes a tensor of any size from one number. Tied weights are several names of one storage.
        claimed: Dict[int, int] = {}
        for t in tensors:
            place = t.untyped_storage().data_ptr()
            claimed[place] = max(claimed.get(place, 0), t.numel() * t.element_size())
        if sum(claimed.values()) > path.stat().st_size:
            raise CheckpointFileError(f'{path} is refused: its tensors claim more bytes than the file has.')
    return checkpoint
