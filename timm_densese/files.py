"""Files and folders that appear whole or not at all, and their hashes."""
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Type, Union

from .errors import UserError

__all__ = ['check_new_folder', 'new_folder', 'printable', 'replace_file', 'sha256']


def check_new_folder(out: Path, option: str, error: Type[UserError] = UserError) -> None:
    """Refuse a folder that holds something, before there is work to lose.

    Args:
        out: Folder that is to be written.
        option: The option that named it, for the message.
        error: Class of the error to raise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(f'{out} exists and is not empty. Remove it or choose another {option}.')


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, which gets its name when all went well and is removed when not.

    Args:
        out: Name that the folder gets; nothing or an empty folder is there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        yield work
        os.chmod(work, 0o755)
        if out.exists():
            out.rmdir()  # empty, as was checked
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def replace_file(file: Path, content: Union[str, bytes]) -> None:
    """Write a file, in a folder that is made if need be; what is there under its name is replaced at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f'.{file.name}')
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        partial.write_text(content, encoding='utf-8')
    os.replace(partial, file)


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
