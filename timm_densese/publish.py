"""Publishes trained models on the Hugging Face Hub, with their card."""
import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from .cards import finetune_card, registered_card
from .checkpoints import Checkpoint, load_model
from .data.msld import is_msld
from .data.splits import read_split
from .errors import OptionError, PublishError, hub_errors
from .files import check_new_file, check_new_folder, new_folder, replace_file
from .metrics import check_weights, read_metrics

__all__ = ['publish', 'write_card']


def _is_msld(data: Optional[Path], recipe: Dict[str, Any]) -> bool:
    """Tell whether the images that were trained on are MSLD's, by their hashes in split.csv."""
    root = data or recipe.get('data_dir') or recipe.get('data') or ''
    return bool(root) and is_msld(read_split(Path(root)).hashes())


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PublishError(f'{repo_id!r} is no name of a repository: {e}') from e
    if '/' not in repo_id:
        raise PublishError(f'{repo_id!r} is no name of a repository: give OWNER/NAME.')


def _checkpoint_card(repo_id: str, loaded: Checkpoint, data: Optional[Path], metrics: Optional[Path]) -> str:
    results = None
    if metrics:
        results = read_metrics(metrics)
        check_weights(f'--metrics {metrics}', results, loaded.hash_weights())
        if loaded.label_names and results.get('classes', loaded.label_names) != loaded.label_names:
            raise PublishError(f'--metrics {metrics} has the classes {results["classes"]}, {loaded.source} has '
                               f'{loaded.label_names}.')
    return str(finetune_card(
        repo_id, loaded.model, loaded.label_names, loaded.data_config, loaded.recipe, loaded.trained,
        _is_msld(data, loaded.recipe), results))


def write_card(
        of: str,
        repo_id: Optional[str] = None,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        metrics: Optional[Path] = None,
        data: Optional[Path] = None,
        class_names: Optional[Sequence[str]] = None,
        output: Optional[Path] = None,
) -> None:
    """Write the model card of a registered model, or of a checkpoint that is or will be published.

    Args:
        of: Name of a registered model, or path of a checkpoint.
        repo_id: Where the checkpoint is published, OWNER/NAME.
        model: Name of the checkpoint's model, see `timm_densese.checkpoints.load_model`, as are `model_kwargs`,
            `data` and `class_names`.
        model_kwargs: Arguments of the checkpoint's model.
        metrics: JSON file of measured metrics, see `timm_densese.metrics.read_metrics`.
        data: Folder that the checkpoint was trained on.
        class_names: Names of the classes.
        output: File to write, replaced if it is there; printed if None.

    Raises:
        UserError: There is no such model, or the checkpoint or metrics do not fit.
    """
    if output is not None:
        if output.suffix.lower() != '.md':
            raise OptionError(f'--output {output} is written as Markdown: name it .md.')
        check_new_file(output, '--output')
    if repo_id is not None:
        _check_repo_id(repo_id)
        loaded = load_model(
            of, 'cpu', architecture=model, model_kwargs=model_kwargs, class_names=class_names, data=data)
        card = _checkpoint_card(repo_id, loaded, data, metrics)
    elif Path(of).is_file():
        raise PublishError(f'{of} is a checkpoint: say as OWNER/NAME where it is published.')
    else:
        card = str(registered_card(of, read_metrics(metrics) if metrics else None))
    if output is None:
        print(card)
        return
    replace_file(output, card)


def publish(
        checkpoint: Path,
        repo_id: str,
        model: str = '',
        model_kwargs: Optional[Dict[str, Any]] = None,
        metrics: Optional[Path] = None,
        data: Optional[Path] = None,
        class_names: Optional[Sequence[str]] = None,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
        output: Optional[Path] = None,
        confirm: Callable[[str], bool] = lambda question: False,
) -> str:
    """Publish a trained model: `model.safetensors`, `config.json` and `README.md`, never a pickle.

    The files are written to a folder with timm's `save_for_hf`, a model is rebuilt from that folder and must give the
    same logits bit for bit, and then that very folder is uploaded in one commit. (timm's `push_to_hf_hub` writes and
    uploads in one go, which leaves no place for the check.)

    Args:
        checkpoint: File of a model of any architecture, see `timm_densese.checkpoints.load_model`.
        repo_id: Repository, OWNER/NAME. It is made if there is none.
        model: Name of the model, the checkpoint's if empty.
        model_kwargs: Arguments of the model, over those that the run recorded.
        metrics: JSON file of measured metrics, see `timm_densese.metrics.read_metrics`.
        data: Folder that the model was trained on; it names the classes.
        class_names: Names of the classes in the order of the outputs, if nothing else tells them.
        private: Make a new repository private.
        revision: Branch to commit to, made if there is none.
        create_pr: Open a pull request instead of committing.
        output: Folder to write the files to instead, which must not exist or be empty.
        confirm: Asked before a README.md that is there already is replaced; without it, that one stays.

    Returns:
        URL of the commit or pull request, or the folder.

    Raises:
        UserError: Checkpoint, names, data or metrics do not fit, or the Hub refuses; nothing half-sent is visible.
    """
    _check_repo_id(repo_id)
    if create_pr and revision:
        raise PublishError('Give --pr or --revision, not both: a pull request makes a branch of its own.')
    if output is not None:
        check_new_folder(output, '--output', PublishError)

    loaded = load_model(
        str(checkpoint), 'cpu', architecture=model, model_kwargs=model_kwargs, class_names=class_names, data=data)
    card = _checkpoint_card(repo_id, loaded, data, metrics)
    with new_folder(output) if output is not None else tempfile.TemporaryDirectory(prefix='timm-densese-') as folder:
        work = Path(folder)
        save_for_hf(
            loaded.model, str(work), safe_serialization=True, data_config=loaded.data_config,
            # The tag and licence are the DenseNet's; these weights are others.
            model_config={'label_names': loaded.label_names or None,
                          'pretrained_cfg': {'tag': '', 'license': ModelCard(card).data.to_dict()['license']}})
        # safetensors gives its file to its owner alone; these are for others.
        (work / 'model.safetensors').chmod((work / 'config.json').stat().st_mode)
        # timm 1.0.31 writes num_classes twice, and transformers' TimmWrapper then passes it twice.
        config = json.loads((work / 'config.json').read_text())
        config.get('model_args', {}).pop('num_classes', None)
        (work / 'config.json').write_text(json.dumps(config, indent=2))
        (work / 'README.md').write_text(card, encoding='utf-8')
        _verify(work, loaded)
        print(f'To {output if output is not None else repo_id}:')
        for file in sorted(work.iterdir()):
            print(f'  {file.name:18} {file.stat().st_size:>11,} bytes')
        if output is None:
            with hub_errors(repo_id, 'publish'):
                return _upload(work, repo_id, private, revision, create_pr, confirm)
    print(f"Load it with\n  import timm, timm_densese\n  timm.create_model('local-dir:{output}', pretrained=True)")
    return str(output)


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
        existing = api.model_info(repo_id)
        if private and not existing.private:
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
