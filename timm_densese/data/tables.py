"""Tables of labels and patients as people have them: of any delimiter, encoding and way to name a file."""
import csv
import io
import re
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Dict, List, Optional, Sequence, Tuple

from ..errors import SplitError
from ..files import printable
from .images import looks_like_image

__all__ = ['describe_names', 'find_column', 'match_files', 'read_table']

# Names of columns, the likeliest first, in small letters and with no others: PatientID, patient_id, Patient No.
_ID = '(id|no|nr|num|number|code|key|name|uid)?'
_COLUMNS = {
    'file': ('file(name|id|path)?', 'image(name|id|path)?', 'img(name|id|path)?', 'path', 'isicid', 'id'),
    'label': ('label(name)?', 'class(name)?', 'dx', 'diagnosis', 'category', 'target'),
    'patient': (f'patients?{_ID}', f'(subject|person){_ID}', 'pid', 'mrn', f'case{_ID}', f'group{_ID}', f'lesion{_ID}'),
}
_EMPTY = {'', 'n/a', '#n/a', '<na>', 'nan'}  # as spreadsheets and pandas write an empty cell
_UNKNOWN = _EMPTY | {'na', 'none', 'null', 'unknown', '?', '-'}
_EXCEL = b'PK\3\4', b'\xd0\xcf\x11\xe0'  # .xlsx, .xls


def read_table(table: Path) -> List[Dict[str, str]]:
    """Read a table with a row of column names, whatever it is separated by: commas, semicolons or tabs.

    UTF-8 and UTF-16, with the mark that Excel puts first or without.

    Returns:
        Its rows: values without blanks around them, by names of columns in small letters.

    Raises:
        SplitError: It is not there or no such table.
    """
    try:
        raw = Path(table).read_bytes()
    except OSError as e:
        raise SplitError(f'{table} cannot be read ({e.strerror}).') from e
    if raw.startswith(_EXCEL):
        raise SplitError(f'{table} is a file of Excel. Save it as CSV, in UTF-8.')
    encoding = 'utf-8-sig'
    if raw[:2] in (b'\xff\xfe', b'\xfe\xff'):
        encoding = 'utf-16'
    elif b'\0' in raw[:2]:
        encoding = 'utf-16-be' if raw[:1] == b'\0' else 'utf-16-le'
    try:
        text = raw.decode(encoding, 'surrogateescape')
        if text[:4].lower() == 'sep=':  # Excel's
            text = text.partition('\n')[2]
        head = text.partition('\n')[0]
        delimiter = max(',;\t|', key=head.count)
        reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
        cells = [[cell.strip() for cell in row] for row in reader if any(row)]
    except (ValueError, csv.Error) as e:
        raise SplitError(f'{table} is no table ({e}). Save it as CSV, in UTF-8.') from e
    if len(cells) < 2:
        raise SplitError(f'{table} has no rows below the names of its columns.')
    names, *rows = cells
    names = [name.lower().replace(' ', '_').replace('-', '_') for name in names]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise SplitError(f'{table} has two columns of the name {twice[0]}. Rename one.')
    wide = next((row for row in rows if any(row[len(names):])), None)
    if wide:  # whose cells may stand under names that are not theirs
        raise SplitError(
            f'{table} names {len(names)} columns, and a row has {len(wide)} cells: {delimiter.join(wide)[:100]}. Give '
            f'every column a name, and quote what holds a {delimiter!r}.')
    return [dict(zip(names, [*row, *[''] * len(names)], strict=False)) for row in rows]


def find_column(table: Path, rows: Sequence[Dict[str, str]], kind: str) -> Optional[str]:
    """Find the column that holds the file, label or patient: of several, the likeliest of which a cell is known.

    Raises:
        SplitError: There is none, and it is not the patient's.
    """
    plain = {name: re.sub(r'[\W_]', '', name) for name in rows[0]}
    names = sorted(plain, key=len)
    found = [name for pattern in _COLUMNS[kind] for name in names if re.fullmatch(pattern, plain[name])]
    if not found and kind != 'patient':
        raise SplitError(f'{table} must have a column for the {kind}, named {kind} or the like; found '
                         f'{", ".join(rows[0])}.')
    filled = (name for name in found if any(row[name].lower() not in _UNKNOWN for row in rows))
    return next(filled, found[0] if found else None)


def describe_names(table: Path) -> str:
    """Say how a table names files, for messages about one that it does not name."""
    rows = read_table(table)
    column = find_column(table, rows, 'file')
    first = printable(rows[0][column or ''])
    return f'Its column {column} must name files as they lie there; its first row has {first}.'


def match_files(table: Path, column: str, kind: str, src: Path, paths: Sequence[Path]) -> List[Optional[str]]:
    """Give each image what a table says of it in a column.

    A row's file is the path of an image or the end of it, of whatever case, with the image's extension, another or
    none, and with slashes of either kind.

    Args:
        table: CSV.
        column: Its column that is read.
        kind: What the column holds, label or patient. Cells such as `n/a` are not known; of a patient, nor is
            `unknown`.
        src: Folder of the images.
        paths: The images.

    Returns:
        A value for each image; '' where it is not known, None where no row names the image.

    Raises:
        SplitError: Two rows say different things of an image, or a row could mean several images.
    """
    rows = read_table(table)
    file_column = find_column(table, rows, 'file')
    assert file_column is not None
    ends: Dict[str, List[int]] = {}
    for i, path in enumerate(paths):
        parts = path.relative_to(src).parts
        for k in range(len(parts)):
            ends.setdefault(_key('/'.join(parts[k:])), []).append(i)
    values: List[Optional[str]] = [None] * len(paths)
    rows_of: Dict[int, int] = {}
    for number, row in enumerate(rows, 2):
        name, value = row[file_column], row[column]
        if value.lower() in (_UNKNOWN if kind == 'patient' else _EMPTY):
            value = ''
        if printable(value) != value:
            raise SplitError(f'{table}, row {number}: {printable(value)} is not UTF-8. Save it as CSV, in UTF-8.')
        for i in _find(name, src, ends, paths, f'{table}, row {number}'):
            if values[i] and value and values[i] != value:
                raise SplitError(
                    f'{table} says of {printable(paths[i])} in row {rows_of[i]} that its {kind} is {values[i]}, and in '
                    f'row {number} that it is {value}. Keep the right one.')
            values[i] = value or values[i] or ''
            rows_of[i] = number
    return values


def _key(name: str) -> str:
    """A file's name without case, accents as one sign, and without what says that it is an image."""
    path = PurePosixPath(unicodedata.normalize('NFC', name.casefold()))
    return (path.with_suffix('') if looks_like_image(path) else path).as_posix()


def _find(
        name: str,
        src: Path,
        ends: Dict[str, List[int]],
        paths: Sequence[Path],
        where: str,
) -> List[int]:
    """Find the one image that a row means, or none."""
    parts: Tuple[str, ...] = tuple(p for p in name.replace('\\', '/').split('/') if p not in ('', '.'))
    if not parts:
        return []
    for own in (src.name, src.resolve().name):
        if own and own in parts[:-1]:  # a path from somewhere above the folder
            inner = parts[len(parts) - parts[::-1].index(own):]
            if _key('/'.join(inner)) in ends:
                parts = inner
    found = ends.get(_key('/'.join(parts)), [])
    if len(found) > 1:
        exact = [i for i in found if paths[i].parts[-len(parts):] == parts]
        whole = [i for i in exact if paths[i].relative_to(src).parts == parts]
        found = whole or exact or found
    if len(found) > 1:
        raise SplitError(f'{where}: {name} can mean {printable(paths[found[0]])} and {printable(paths[found[1]])}. '
                         f'Give the path below {src}.')
    return found
