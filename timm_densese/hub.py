"""Trained models: found wherever they are, and published on the Hugging Face Hub with their card."""
import csv
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import timm
import torch
import yaml
from huggingface_hub import (
    HfApi,
    ModelCard,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.data import ImageNetInfo, create_dataset, resolve_data_config
from timm.models import clean_state_dict, get_pretrained_cfg, is_model, save_for_hf

from .checks import check_model_args, read_checkpoint
from .errors import ModelNotFoundError, PublishError, hub_errors
from .files import check_new_folder, new_folder, replace_file
from .se_densenet import SEDenseNet

__all__ = ['Checkpoint', 'find_weights', 'load_checkpoint', 'load_model', 'publish', 'short_name', 'write_card']


def find_weights(repo_id: str) -> bool:
    """Tell whether a repository's weights can be had, from the cache or the Hub, and print why if not.

    One request with a short timeout: a download without a network retries for 45 seconds before it gives up.

    Args:
        repo_id: Repository with a `model.safetensors`, `timm/densenet121.ra_in1k` for example.
    """
    file = (repo_id, 'model.safetensors')
    if isinstance(try_to_load_from_cache(*file), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(*file), timeout=10)
    except Exception as e:  # no network, no DNS, a proxy's page, no such repository: whoever asks goes on without
        print(f'The Hugging Face Hub could not be reached for {repo_id} ({type(e).__name__}: {e}).')
        return False
    return True


class Checkpoint(NamedTuple):
    """A trained model and what its run recorded.

    Attributes:
        model: The model in eval mode, on the CPU.
        label_names: Names of the classes, empty if they are not known.
        data_config: Preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
        recipe: The run's options by name, empty if they are not known.
        trained: A sentence on which weights these are.
    """
    model: Any
    label_names: List[str]
    data_config: Dict[str, Any]
    recipe: Dict[str, Any]
    trained: str

    @property
    def class_names(self) -> List[str]:
        """Names of the classes, their numbers where the names are not known."""
        return self.label_names or [str(i) for i in range(self.model.num_classes)]


def load_checkpoint(
        checkpoint: Path,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        data: Optional[Path] = None,
) -> Checkpoint:
    """Rebuild the model of a checkpoint of timm's train.py or of `timm-densese train`.

    Averaged (EMA) weights are taken where there are some: they are what both loops validate. The classes, the input
    and the model's arguments come from the run's args.yaml beside the checkpoint, or the arguments in the checkpoint.

    Args:
        checkpoint: File that the loop wrote, or a bare state dict.
        model: Name of the model, the checkpoint's if empty.
        model_kwargs: Arguments of the model, over those that the run recorded.
        data: Folder that names the classes: class folders, or splits of class folders.

    Returns:
        The model and what is known of it.

    Raises:
        CheckpointFileError: The file cannot be read or is refused.
        CheckpointMismatchError: Its tensors are not the model's.
        ModelConfigError: The run's arguments are not the model's.
        PublishError: The model's name or classes are missing or do not fit.
    """
    checkpoint = Path(checkpoint)
    saved = read_checkpoint(checkpoint)
    args_file = checkpoint.parent / 'args.yaml'
    recipe: Dict[str, Any] = {}
    if args_file.is_file():
        recipe = yaml.safe_load(args_file.read_text()) or {}
    elif 'args' in saved:
        recipe = dict(vars(saved['args']))

    name = model or saved.get('arch') or recipe.get('model') or ''
    if not isinstance(name, str) or not is_model(name):
        raise PublishError(f'Which model is {checkpoint}? It says {name or "nothing"!r}. Keep it beside its run\'s '
                           f'args.yaml, or publish it with --model se_densenet121 or another of `timm-densese models`.')
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    key = next((k for k in keys if isinstance(saved.get(k), dict)), '')
    state_dict = clean_state_dict(saved[key] if key else saved)
    cfg: Any = get_pretrained_cfg(name)
    classifier, first_conv = (f'{layer}.weight' for layer in (cfg.classifier, cfg.first_conv))
    weight, stem = state_dict.get(classifier), state_dict.get(first_conv)
    if weight is None or stem is None:
        raise PublishError(
            f'{checkpoint} holds no {classifier} or no {first_conv}: it is no checkpoint of a {name} classifier. It '
            f'holds {", ".join(list(state_dict)[:5]) or "nothing"}.')
    kwargs = {
        **({'global_pool': recipe['gp']} if recipe.get('gp') else {}), **(recipe.get('model_kwargs') or {}),
        **(model_kwargs or {}), 'num_classes': weight.shape[0]}
    if stem.shape[1] != 3:
        kwargs['in_chans'] = stem.shape[1]
    check_model_args(name, kwargs)
    net: Any = timm.create_model(name, **kwargs)
    net.load_state_dict(state_dict)

    input_options = {k: v for k, v in recipe.items()
                     if k in ('img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode') and v}
    data_config = resolve_data_config({**input_options, 'in_chans': net.in_chans}, model=net)
    labels = _label_names(recipe, data, net.num_classes)
    trained = [f'These are the {"averaged" if "ema" in key else "raw"} weights']
    if isinstance(saved.get('epoch'), int):
        trained.append(f' after epoch {saved["epoch"]}')
    if isinstance(saved.get('metric'), float) and recipe.get('eval_metric'):
        trained.append(f', where validation {recipe["eval_metric"]}, which chose them, was {saved["metric"]:.4f}')
    return Checkpoint(net.eval(), labels, data_config, recipe, ''.join(trained) + '.')


def load_model(of: str) -> Checkpoint:
    """Load a model to use it: a checkpoint, a repository of the Hub, a folder, or a registered model's own weights.

    Args:
        of: Path of a checkpoint, `hf-hub:OWNER/NAME`, `local-dir:DIR`, or the name of a model with pretrained weights.

    Returns:
        The model in eval mode and what is known of it; no recipe where it is not a checkpoint.

    Raises:
        ModelNotFoundError: It is none of these.
        UserError: It cannot be read or had, as for `load_checkpoint`.
    """
    if Path(of).is_file():
        return load_checkpoint(Path(of))
    scheme, _, where = of.rpartition(':')
    if scheme == 'local-dir' and not (Path(where) / 'config.json').is_file():
        raise ModelNotFoundError(f'{where} has no config.json: give a folder that `timm-densese publish --to` wrote.')
    if not scheme and not is_model(of):
        hint = f' It is a folder: give a checkpoint in it, or local-dir:{of}.' if Path(of).is_dir() else ''
        raise ModelNotFoundError(
            f'{of} is no file and no model.{hint} Give a checkpoint, hf-hub:OWNER/NAME, local-dir:DIR, or a name such '
            f'as those of `timm-densese models`.')
    if not scheme and not get_pretrained_cfg(of).has_weights:  # type: ignore[union-attr]
        raise ModelNotFoundError(f'{of} has no pretrained weights. Give a checkpoint of it.')
    with hub_errors(where, 'load'):
        net: Any = timm.create_model(of, pretrained=True).eval()
    labels = list(net.pretrained_cfg.get('label_names') or [])
    if not labels and net.num_classes == 1000:
        labels = list(ImageNetInfo('imagenet-1k').label_descriptions())
    return Checkpoint(net, labels, resolve_data_config({}, model=net), {}, '')


def short_name(of: str) -> str:
    """Name a model for a page that others read: of a path, the last two parts."""
    return '/'.join(Path(of).parts[-2:]) if Path(of).exists() else of


def _label_names(recipe: Dict[str, Any], data: Optional[Path], num_classes: int) -> List[str]:
    """Class names in the order of the logits, from the run's record or the data's folders."""
    recorded = list(recipe.get('class_names') or [])
    root = data or recipe.get('data_dir') or recipe.get('data')
    found: List[str] = []
    if root and Path(root).is_dir():
        split = recipe.get('train_split') or 'train'
        folder = Path(root) / split if (Path(root) / split).is_dir() else Path(root)
        try:
            index: Any = create_dataset('', root=str(folder)).reader.class_to_idx  # type: ignore[attr-defined]
            found = sorted(index, key=index.get)
        except Exception as e:  # timm's readers raise what they meet
            if data:
                raise PublishError(f'--data {data} names no classes: {e}') from e
    elif data:
        raise PublishError(f'--data {data} is not a folder.')
    if data and recorded and found != recorded:
        raise PublishError(f'--data {data} has the classes {found}, the run recorded {recorded}.')
    labels = recorded or found
    if labels and len(labels) != num_classes:
        if data or recorded:
            raise PublishError(f'The classes are {labels}, but the checkpoint has {num_classes} outputs.')
        return []
    return labels


def _is_msld(data: Optional[Path], recipe: Dict[str, Any]) -> bool:
    """Tell whether the images of a split are MSLD's, by their hashes in split.csv."""
    root = data or recipe.get('data_dir') or recipe.get('data') or ''
    table = Path(root) / 'split.csv'
    if not root or not table.is_file():
        return False
    manifest = resources.files(__package__).joinpath('msld.csv').read_text()
    known = {row['sha256'] for row in csv.DictReader(manifest.splitlines())}
    with open(table, newline='') as file:
        return any(row.get('sha256') in known for row in csv.DictReader(file))


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PublishError(f'{repo_id!r} is no name of a repository: {e}') from e
    if '/' not in repo_id:
        raise PublishError(f'{repo_id!r} is no name of a repository: give OWNER/NAME.')


def _checkpoint_card(repo_id: str, loaded: Checkpoint, data: Optional[Path], metrics: Optional[Path]) -> str:
    from .cards import finetune_card, read_metrics  # not at the top, for `import timm_densese` to stay quick

    if not isinstance(loaded.model, SEDenseNet):
        raise PublishError(f'{loaded.model.pretrained_cfg["architecture"]} is not a model of this package; '
                           f'timm.models.push_to_hf_hub publishes it.')

    return str(finetune_card(
        repo_id, loaded.model, loaded.label_names, loaded.data_config, loaded.recipe, loaded.trained,
        _is_msld(data, loaded.recipe), read_metrics(metrics) if metrics else None))


def write_card(
        of: str,
        repo_id: Optional[str] = None,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        metrics: Optional[Path] = None,
        data: Optional[Path] = None,
        out: Optional[Path] = None,
) -> None:
    """Write the model card of a registered model, or of a checkpoint that is or will be published.

    Args:
        of: Name of a registered model, or path of a checkpoint.
        repo_id: Where the checkpoint is published, OWNER/NAME.
        model: Name of the checkpoint's model, see `load_checkpoint`, as are `model_kwargs` and `data`.
        model_kwargs: Arguments of the checkpoint's model.
        metrics: JSON file of measured metrics, see `timm_densese.cards.read_metrics`.
        data: Folder that the checkpoint was trained on.
        out: File to write, replaced if it is there; printed if None.

    Raises:
        UserError: There is no such model, or the checkpoint or metrics do not fit.
    """
    from .cards import read_metrics, registered_card

    if repo_id is not None:
        _check_repo_id(repo_id)
        card = _checkpoint_card(repo_id, load_checkpoint(Path(of), model, model_kwargs, data), data, metrics)
    elif Path(of).is_file():
        raise PublishError(f'{of} is a checkpoint: say as OWNER/NAME where it is published.')
    else:
        card = str(registered_card(of, read_metrics(metrics) if metrics else None))
    if out is None:
        print(card)
        return
    replace_file(out, card)


def publish(
        checkpoint: Path,
        repo_id: str,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        metrics: Optional[Path] = None,
        data: Optional[Path] = None,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
        to: Optional[Path] = None,
        confirm: Callable[[str], bool] = lambda question: False,
) -> str:
    """Publish a trained model: `model.safetensors`, `config.json` and `README.md`, never a pickle.

    The files are written to a folder with timm's `save_for_hf`, a model is rebuilt from that folder and must give the
    same logits bit for bit, and then that very folder is uploaded in one commit. (timm's `push_to_hf_hub` writes and
    uploads in one go, which leaves no place for the check.)

    Args:
        checkpoint: Checkpoint of timm's train.py or of `timm-densese train`.
        repo_id: Repository, OWNER/NAME. It is made if there is none.
        model: Name of the model, the checkpoint's if empty.
        model_kwargs: Arguments of the model, over those that the run recorded.
        metrics: JSON file of measured metrics, see `timm_densese.cards.read_metrics`.
        data: Folder that the model was trained on; it names the classes.
        private: Make a new repository private.
        revision: Branch to commit to, made if there is none.
        create_pr: Open a pull request instead of committing.
        to: Folder to write the files to instead, which must not exist or be empty.
        confirm: Asked before a README.md that is there already is replaced; without it, that one stays.

    Returns:
        URL of the commit or pull request, or the folder.

    Raises:
        UserError: Checkpoint, names, data or metrics do not fit, or the Hub refuses; nothing half-sent is visible.
    """
    _check_repo_id(repo_id)
    if create_pr and revision:
        raise PublishError('Give --pr or --revision, not both: a pull request makes a branch of its own.')
    if to is not None:
        check_new_folder(to, '--to', PublishError)

    loaded = load_checkpoint(checkpoint, model, model_kwargs, data)
    card = _checkpoint_card(repo_id, loaded, data, metrics)
    with new_folder(to) if to is not None else tempfile.TemporaryDirectory(prefix='timm-densese-') as folder:
        work = Path(folder)
        save_for_hf(
            loaded.model, str(work), safe_serialization=True, data_config=loaded.data_config,
            # The tag and licence are the DenseNet's; these weights are others.
            model_config={'label_names': loaded.label_names or None,
                          'pretrained_cfg': {'tag': '', 'license': ModelCard(card).data.to_dict()['license']}})
        # timm 1.0.31 writes num_classes twice, and transformers' TimmWrapper then passes it twice.
        config = json.loads((work / 'config.json').read_text())
        config['model_args'].pop('num_classes', None)
        (work / 'config.json').write_text(json.dumps(config, indent=2))
        (work / 'README.md').write_text(card, encoding='utf-8')
        _verify(work, loaded)
        print(f'To {to if to is not None else repo_id}:')
        for file in sorted(work.iterdir()):
            print(f'  {file.name:18} {file.stat().st_size:>11,} bytes')
        if to is None:
            with hub_errors(repo_id, 'publish'):
                return _upload(work, repo_id, private, revision, create_pr, confirm)
    print(f"Load it with\n  import timm, timm_densese\n  timm.create_model('local-dir:{to}', pretrained=True)")
    return str(to)


@torch.inference_mode()
def _verify(folder: Path, loaded: Checkpoint) -> None:
    """Rebuild the model from the files that will be published, and compare logits bit for bit."""
    rebuilt: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, *loaded.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    if not torch.equal(rebuilt(images), loaded.model(images)):
        raise PublishError(
            'The files rebuild a model with other logits, so nothing was sent. Give the arguments that the model was '
            'trained with as --model-kwargs.')


def _upload(
        folder: Path,
        repo_id: str,
        private: bool,
        revision: Optional[str],
        create_pr: bool,
        confirm: Callable[[str], bool],
) -> str:
    api = HfApi(library_name='timm-densese')
    ignore = []
    try:
        there = api.model_info(repo_id)
        if private and not there.private:
            raise PublishError(f'{repo_id} exists and is public: --private does not hide it. Change it in its settings '
                               f'first, or publish under another name.')
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if api.file_exists(repo_id, 'README.md', revision=revision):
        readme = Path(api.hf_hub_download(repo_id, 'README.md', revision=revision)).read_bytes()
        same = readme == (folder / 'README.md').read_bytes()
        if not same and not confirm(f'{repo_id} has a README.md of its own. Replace it?'):
            ignore.append('README.md')
            print(f'The README.md of {repo_id} stays as it is.')
    try:
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, ignore_patterns=ignore,
            commit_message='Publish the model with timm-densese')
    except RuntimeError as e:  # huggingface_hub wraps what stopped an upload
        raise e.__cause__ if isinstance(e.__cause__, Exception) else e from e
    url = commit.pr_url or commit.commit_url
    at = f'@{revision}' if revision else ''
    print(f"{url}\nLoad it with\n  import timm, timm_densese\n"
          f"  timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)")
    return url
