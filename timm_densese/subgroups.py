"""Scores for each site, device, skin tone, or whatever a table says of the images or their patients."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from .comparisons import mean_scores
from .data.tables import find_column, match_files, read_table
from .errors import OptionError, SplitError
from .metrics import Scores, with_intervals

__all__ = ['read_subgroups', 'subgroup_scores', 'warn_of_few']

_MOST, _FEWEST = 20, 20
UNKNOWN = 'not known'


def read_subgroups(table: Path, src: Path, files: Sequence[Path], patients: Sequence[str]) -> Dict[str, List[str]]:
    """Read what a table says of images.

    Args:
        table: Table with a column for the image's file, or else for the patient, as `timm-densese data split --groups`
            takes them; every other column makes subgroups.
        src: Folder that the files are in.
        files: The images, (N,).
        patients: Their patients, '' where they are not known, (N,).

    Returns:
        A value for each image, by column.

    Raises:
        OptionError: The table cannot be read, knows no image, or has no column of up to 20 values.
    """
    given = f'--subgroups {table}'
    try:
        rows = read_table(table)
        patient = find_column(table, rows, 'patient')
        try:
            file = find_column(table, rows, 'file')
        except SplitError:
            if patient is None:
                raise
            file = None
        columns = [name for name in rows[0] if name and name not in (file, patient)]
        if file:
            found = {name: match_files(table, name, 'subgroup', src, files) for name in columns}
        else:
            of = _by_patient(table, rows, str(patient), columns)
            found = {name: [of[name].get(key) if key else None for key in patients] for name in columns}
    except SplitError as e:
        raise OptionError(f'{given}: {e}') from e
    if not any(value is not None for values in found.values() for value in values):
        what = 'files' if file else 'patients (which are known where the images were split with --groups or the like)'
        raise OptionError(f'{given} knows none of the {len(files)} {what}; its first row has '
                          f'{rows[0][str(file or patient)]!r}.')
    kept = {name: [value or UNKNOWN for value in values] for name, values in found.items()
            if 1 < len(set(filter(None, values))) <= _MOST}
    left_out = [f'{name} ({len(set(filter(None, values)))} values)' for name, values in found.items()
                if name not in kept]
    if not kept:
        raise OptionError(f'{given} must have a column of 2 to {_MOST} values beside {file or patient}; it has '
                          f'{", ".join(left_out) or "none"}. Make bands of numbers.')
    if left_out:
        print(f'{given}: left out, for they make no 2 to {_MOST} groups: {", ".join(left_out)}.')
    return kept


def _by_patient(table: Path, rows: List[Dict[str, str]], patient: str, columns: List[str]) -> Dict[str, Dict[str, str]]:
    found: Dict[str, Dict[str, str]] = {name: {} for name in columns}
    for number, row in enumerate(rows, 2):
        for name in columns:
            value = found[name].setdefault(row[patient], row[name])
            if value != row[name]:
                raise SplitError(f'{table} says of patient {row[patient]} that {name} is {value}, and in row {number} '
                                 f'that it is {row[name]}. Keep the right one.')
    return found


def subgroup_scores(
        labels: np.ndarray,
        probabilities: np.ndarray,
        classes: Sequence[str],
        groups: np.ndarray,
        subgroups: Dict[str, List[str]],
        samples: np.ndarray,
) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """Score each subgroup.

    Args:
        labels: (N,).
        probabilities: (seeds, N, num_classes).
        classes: Names of the classes.
        groups: Number of each image's patient or group, (N,).
        subgroups: What `read_subgroups` gives.
        samples: What `timm_densese.metrics.bootstrap` drew.

    Returns:
        By column and value: `images`, `groups`, `few` (so few patients or groups that it tells little), `metrics`.
    """
    found: Dict[str, Dict[str, Dict[str, Any]]] = {}
    for column, values in subgroups.items():
        found[column] = {}
        for value in sorted(set(values)):
            mine = np.array(values) == value
            several = len(np.unique(labels[mine])) > 1

            def measure(weights: Optional[np.ndarray], mine: np.ndarray = mine, several: bool = several) -> Scores:
                weights = None if weights is None else weights[:, mine]
                with np.errstate(invalid='ignore', divide='ignore'):  # a sample may draw none of them
                    scores = mean_scores(labels[mine], probabilities[:, mine], classes, weights)
                # Of images of one class, a balanced accuracy would be that class's recall.
                return {name: values for name, values in scores.items()
                        if '/' not in name and (several or name != 'balanced_accuracy')}

            patients = len(np.unique(groups[mine]))
            found[column][value] = {'images': int(mine.sum()), 'groups': patients, 'few': patients < _FEWEST,
                                    'metrics': with_intervals(measure, samples, f'{column} {value}')}
    return found


def warn_of_few(found: Dict[str, Dict[str, Dict[str, Any]]], unit: str) -> List[str]:
    """Give a warning for each subgroup of few patients.

    Args:
        found: What `subgroup_scores` gives.
        unit: What the groups are: 'patients', for example.
    """
    return [f'{column} {value}: {part["groups"]} {unit} are few, and its scores tell little.'
            for column, values in found.items() for value, part in values.items() if part['few']]
