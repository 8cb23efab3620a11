"""Files and folders that appear whole or not at all, and their hashes."""
import hashlib
import os
import secrets
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Type, Union

from .errors import OptionError, UserError

__all__ = [
    'check_new_file', 'check_new_folder', 'check_writable', 'new_folder', 'printable', 'replace_file', 'sha256',
]


def check_new_folder(out: Path, option: str, error: Type[UserError] = UserError) -> None:
    """Refuse a folder that holds something, before there is work to lose.

    Args:
        out: Folder that is to be written.
        option: The option that named it, for the message.
        error: Class of the error to raise.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise error(f'{out} exists and is not empty. Remove it or choose another {option}.')
    elif os.path.lexists(out):
        raise error(f'{out} is a file, or a link to nothing. Choose another {option}.')
    check_writable(out, option)


def check_writable(path: Path, option: str) -> None:
    """Refuse a file or folder that could not be written, before there is work to lose.

    Args:
        path: File or folder that is to be written, with the folders above it that are missing.
        option: The option that named it, for the message.

    Raises:
        OptionError: It cannot be written.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if there != path and not there.is_dir():
        raise OptionError(f'{option} {path}: {there} is a file, not a folder.')
    try:
        # By trying: rights do not tell of a file system that takes nothing, nor of one that is full.
        with tempfile.TemporaryFile(dir=there) if there.is_dir() else open(there, 'ab'):
            pass
    except OSError as e:
        raise OptionError(
            f'{option} {path}: {there} cannot be written ({e.strerror}). Choose another {option}.') from e


def check_new_file(file: Path, option: str) -> None:
    """Refuse a file that could not be written; one that is there may be replaced.

    Args:
        file: File that is to be written.
        option: The option that named it, for the message.

    Raises:
        OptionError: It cannot be written.
    """
    if file.is_dir():
        raise OptionError(f'{option} {file} is a folder: give a file.')
    check_writable(file.parent if file.exists() else file, option)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which gets its name when all went well and is removed when not.

    Args:
        out: Name that the folder gets; nothing or an empty folder is there.
    """
    there = out.is_dir()  # '.', a mount point or a link cannot be replaced, so what is written goes into it at the end
    parent = out if there else out.parent
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f'.{out.name}-{secrets.token_hex(4)}'
    work.mkdir()
    try:
        yield work
        if there:
            for path in sorted(work.iterdir()):
                os.rename(path, out / path.name)
            work.rmdir()
        else:
            os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def replace_file(file: Path, content: Union[str, bytes]) -> None:
    """Write a file, in a folder that is made if need be; what is there under its name is replaced at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f'.{secrets.token_hex(8)}.partial')
    try:
        # Names of files that are not UTF-8 keep their bytes.
        partial.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogateescape'))
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(file: Path) -> str:
    """Hash a file's bytes, a part at a time."""
    digest = hashlib.sha256()
    with open(file, 'rb') as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def printable(name: Union[str, Path]) -> str:
    r"""Show a file's name on any output: what is not UTF-8 in it is escaped.

    Example:
        >>> print(printable('caf\udce9.png'))
        caf\xe9.png
    """
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
