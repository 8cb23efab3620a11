"""Files and folders that appear whole, under any name that a user gives, with the rights of any file."""
import os
from pathlib import Path

import pytest
from conftest import run_cli

from timm_densese.errors import OptionError, UserError
from timm_densese.files import check_new_file, check_new_folder, new_folder, replace_file
from timm_densese.publish import publish


@pytest.fixture
def places(small_disk, tmp_path, monkeypatch):
    """Empty folders that cannot be replaced by another, and one that can."""
    for name in ('real', 'here', 'plain'):
        (tmp_path / name).mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    monkeypatch.chdir(tmp_path / 'here')
    return {'a mount point': small_disk, 'a link': tmp_path / 'link', '.': os.curdir, 'empty': tmp_path / 'plain',
            'new': tmp_path / 'some' / 'new'}


@pytest.mark.parametrize('place', ['a mount point', 'a link', '.', 'empty', 'new'])
def test_a_model_is_published_into_any_empty_folder(places, trained, place):
    folder = places[place]
    publish(trained[1], 'owner/name', output=type(trained[1])(folder))
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert {os.stat(os.path.join(folder, name)).st_mode & 0o777 for name in os.listdir(folder)} == {
        0o666 & ~_umask()}
    # And not twice.
    result = run_cli('publish', trained[1], 'owner/name', '--output', folder)
    assert result.returncode == 1
    assert 'not empty' in result.stderr


@pytest.mark.parametrize('place', ['a mount point', 'a link', '.', 'empty', 'new'])
def test_what_fails_leaves_nothing(places, trained, place):
    folder = type(trained[1])(places[place])

    def fail():
        with new_folder(folder) as work:
            (work / 'half').write_text('done')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not folder.exists() or not list(folder.iterdir())
    assert not list(folder.absolute().parent.glob('.*'))


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_folder_has_the_rights_of_any(tmp_path):
    (tmp_path / 'any').mkdir()
    with new_folder(tmp_path / 'new'):
        pass
    assert (tmp_path / 'new').stat().st_mode == (tmp_path / 'any').stat().st_mode


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'broken').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_text('')
    for name in ('file', 'broken', 'full'):
        with pytest.raises(UserError, match=f'{name}.*[Cc]hoose another --output'):
            check_new_folder(tmp_path / name, '--output')
    with pytest.raises(OptionError, match='is a file, not a folder'):
        check_new_folder(tmp_path / 'file' / 'below', '--output')
    if Path('/proc').is_dir():  # where root may write, and nobody can
        with pytest.raises(OptionError, match=r'/proc cannot be written \(.*Choose another --output'):
            check_new_file(Path('/proc/x.csv'), '--output')
    with pytest.raises(OptionError, match='is a folder: give a file'):
        check_new_file(tmp_path, '--output')
    with pytest.raises(OptionError, match='is a file, not a folder'):
        check_new_file(tmp_path / 'file' / 'x.csv', '--output')


def test_replace_file_leaves_the_old_or_the_new(small_disk):
    replace_file(small_disk / 'a' / 'x.csv', 'old')
    with pytest.raises(OSError, match='No space'):
        replace_file(small_disk / 'a' / 'x.csv', bytes(2 << 20))
    assert [path.name for path in (small_disk / 'a').iterdir()] == ['x.csv']
    assert (small_disk / 'a' / 'x.csv').read_text() == 'old'


def test_replace_file_leaves_others(tmp_path):
    (tmp_path / '.x.csv').write_text('mine')
    replace_file(tmp_path / 'x.csv', 'new')
    replace_file(tmp_path / f'{"x" * 251}.csv', 'new')
    assert (tmp_path / '.x.csv').read_text() == 'mine'
    assert len(list(tmp_path.iterdir())) == 3


def test_predict_into_a_folder_is_refused_before_the_work(trained, tmp_path):
    (tmp_path / 'folder.csv').mkdir()
    result = run_cli('predict', trained[1], trained[0] / 'test', '--output', tmp_path / 'folder.csv')
    assert result.returncode == 2
    assert 'give a file' in result.stderr
    assert 'image/s' not in result.stderr
    assert [path.name for path in tmp_path.rglob('*')] == ['folder.csv']
