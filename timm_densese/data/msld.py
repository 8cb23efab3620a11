"""MSLD, the Monkeypox Skin Lesion Dataset: its download, its terms, and how its images are recognised."""
import csv
import socket
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Dict, Iterable, List, Optional

import torch
from tqdm import tqdm  # comes with huggingface_hub

from ..errors import DownloadError
from ..files import check_writable, sha256

__all__ = ['MSLD_CITATION', 'MSLD_LICENSE', 'MSLD_LIMITS', 'MSLD_PATIENT', 'MSLD_TERMS', 'download_msld', 'is_msld',
           'msld_patients']

# The MSLD originals, as their manifest in this package lists them.
_MSLD_URL = 'https://raw.githubusercontent.com/atlan-antillia/EfficientNet-MonkeyPox/' \
            '37f97b95a3d4895befff3f1177d0570a448a681d'
MSLD_TERMS = """\
Monkeypox Skin Lesion Dataset (MSLD): Ali et al., arXiv:2207.03342, Kaggle nafin59/monkeypox-skin-lesion-dataset.
Terms of use: research and education only, non-commercial, never for diagnosis."""
MSLD_LIMITS = """\
Its authors gathered the images from websites, news and published cases: 228 originals of 162 patients. Skin tone, age \
and body site are not recorded, so nothing tells for whom the scores hold. The other class is chickenpox and measles, \
and no healthy skin."""
# As a card's metadata says it.
MSLD_LICENSE = {'license': 'other', 'license_name': 'msld-research-only',
                'license_link': 'https://arxiv.org/abs/2207.03342'}
MSLD_CITATION = """
```bibtex
@article{ali2022monkeypox,
  title={Monkeypox Skin Lesion Detection Using Deep Learning Models: A Preliminary Feasibility Study},
  author={Ali, Shams Nafisa and others},
  journal={arXiv preprint arXiv:2207.03342},
  year={2022}
}
```"""
# MSLD names a file <patient>_<shot>: M… for monkeypox patients, NM… for the others.
MSLD_PATIENT = r'^(N?M\d+)_\d+'

_ATTEMPTS = 5


def _manifest() -> List[Dict[str, str]]:
    text = resources.files(__package__).joinpath('msld.csv').read_text(encoding='utf-8')
    return list(csv.DictReader(text.splitlines()))


def msld_patients() -> Dict[str, Dict[str, str]]:
    """Give the patients of MSLD's originals, by the SHA-256 and the name of the file: two share one picture."""
    patients: Dict[str, Dict[str, str]] = {}
    for row in _manifest():
        patients.setdefault(row['sha256'], {})[Path(row['file']).name] = row['patient']
    return patients


def is_msld(hashes: Iterable[str]) -> bool:
    """Tell whether some of these SHA-256 are those of MSLD's originals."""
    return not msld_patients().keys().isdisjoint(hashes)


def _check_reachable(base_url: str) -> None:
    """Give up at once where there is no network: each of the images would be tried for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(base_url, method='HEAD'), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as e:
        raise DownloadError(
            f'{base_url} could not be reached ({getattr(e, "reason", e)}), so nothing was downloaded. Check the '
            f'connection, or point --base-url at a copy of the repository.') from e


def download_msld(output: Path, base_url: str = _MSLD_URL, backoff: float = 1.) -> None:
    """Download the 228 original images of MSLD, each checked against its SHA-256.

    What is there already and right is kept, so an interrupted download goes on where it stopped. A file appears under
    its name only when it is whole.

    Args:
        output: Folder that gets `Monkeypox/`, `Others/` and `manifest.csv` (file, label, patient, sha256, source_path).
        base_url: Where the paths of the manifest's `source_path` column are served.
        backoff: Seconds to wait before the second attempt at a file; each further wait is twice as long.

    Raises:
        DownloadError: Some files could not be had after five attempts each; it names them with the reason.
    """
    print(MSLD_TERMS)
    check_writable(output, '--output')
    rows = _manifest()
    manifest = resources.files(__package__).joinpath('msld.csv').read_bytes()
    there = output / 'manifest.csv'
    if there.exists() and there.read_bytes() != manifest:
        raise DownloadError(f'{there} is of something else, and would be written over. Choose another --output.')
    stopped = Event()

    def fetch(row: Dict[str, str]) -> Optional[str]:
        file = output / row['file']
        if file.is_file() and sha256(file) == row['sha256']:
            return None
        url = f'{base_url.rstrip("/")}/{urllib.parse.quote(row["source_path"])}'
        for attempt in range(_ATTEMPTS):
            if attempt:
                stopped.wait(backoff * 2 ** (attempt - 1))
            if stopped.is_set():
                return None
            try:
                # Writes to a temporary name beside the file, checks the hash, renames.
                torch.hub.download_url_to_file(url, str(file), hash_prefix=row['sha256'], progress=False)
                return None
            except urllib.error.HTTPError as e:
                reason = f'HTTP {e.code} {e.reason}'
                if e.code < 500 and e.code not in (408, 429):
                    break
            except (OSError, RuntimeError) as e:  # no connection, a connection that broke, other bytes than ours
                reason = str(e)
        return f'{row["file"]}: {reason} ({url})'

    if not all((output / row['file']).is_file() for row in rows):
        _check_reachable(base_url)
    for label in sorted({row['label'] for row in rows}):
        (output / label).mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torch.hub's download takes none, and a silent server would hold it for ever
    try:
        with ThreadPoolExecutor(8) as pool:
            try:
                progress = tqdm(pool.map(fetch, rows), total=len(rows), desc='MSLD', unit='image')
                failures = list(filter(None, progress))
            except KeyboardInterrupt:
                stopped.set()  # the pool waits for what it has begun, and begins nothing
                raise KeyboardInterrupt('The images that came are kept: the same command goes on.') from None
    finally:
        socket.setdefaulttimeout(timeout)
    if failures:
        shown = '\n  '.join(failures[:5])
        more = f'\n  and {len(failures) - 5} more' if len(failures) > 5 else ''
        raise DownloadError(
            f'{len(failures)} of {len(rows)} images could not be downloaded:\n  {shown}{more}\n'
            f'The others are in {output}. Run the command again to go on from there; if the source is down, point '
            f'--base-url at a copy of the repository.')
    there.write_bytes(manifest)
    print(f'{len(rows)} images in {output}, every one with the SHA-256 of the manifest.')
