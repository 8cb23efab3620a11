"""What options accept, declared once: the command line, YAML files and Python calls are checked by the same objects."""
import argparse
import ast
import difflib
import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.data import create_transform

from .errors import ModelConfigError, OptionError, UserError

__all__ = [
    'Augmentation',
    'Choice',
    'Device',
    'Flag',
    'ListOf',
    'Mapping',
    'ModelName',
    'ModuleName',
    'Number',
    'Text',
    'check',
    'close_matches',
    'first_line',
    'option_errors',
    'parse_argument',
]


# Each kind is called with a value or its text, gives the value, and raises ArgumentTypeError with what is allowed:
# argparse takes it as a `type`, and puts the option's name before the message.


class Number:
    """A number within bounds.

    Args:
        kind: int or float.
        least: Smallest number.
        most: Largest number.
        above: Number that it must be above.
        below: Number that it must be below.
    """

    def __init__(
            self,
            kind: type,
            least: Optional[float] = None,
            most: Optional[float] = None,
            above: Optional[float] = None,
            below: Optional[float] = None,
    ) -> None:
        self.kind = kind
        self.bounds = (least, most, above, below)

    def __call__(self, value: Any) -> Any:
        least, most, above, below = self.bounds
        try:
            number = self.kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if (number is None or isinstance(value, bool) or not number == float(value)  # nan, or cut to an int
                or abs(number) == float('inf')
                or (least is not None and number < least) or (most is not None and number > most)
                or (above is not None and number <= above) or (below is not None and number >= below)):
            raise argparse.ArgumentTypeError(f'{value!r} is not {self}')
        return number

    def __str__(self) -> str:
        words = [f'{word} {bound:g}' for word, bound in zip(
            ('of at least', 'of at most', 'above', 'below'), self.bounds, strict=True) if bound is not None]
        return ' '.join(['a whole number' if self.kind is int else 'a number', ' and '.join(words)]).strip()


class Choice:
    """A name out of some.

    Args:
        what: What the names are of, in the singular.
        names: The names.
    """

    def __init__(self, what: str, names: Sequence[str]) -> None:
        self.what = what
        self.names = names

    def __call__(self, value: Any) -> str:
        if value not in self.names:
            raise argparse.ArgumentTypeError(f'{value!r} is no {self.what}{close_matches(value, self.names)}')
        return value


class Text:
    """Text, or a path."""

    def __call__(self, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise argparse.ArgumentTypeError(f'{value!r} is not text')
        return os.fspath(value)


class Flag:
    """Yes or no."""

    def __call__(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f'{value!r} is not true or false')
        return value


class Mapping:
    """Values by name."""

    def __call__(self, value: Any) -> dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise argparse.ArgumentTypeError(f'{value!r} is not NAME=VALUE ...')
        return value


class ListOf:
    """Several values of a kind.

    Args:
        kind: What each is.
        count: How many there are, None for any number.
        rising: None is smaller than the one before it.
    """

    def __init__(self, kind: Callable[[Any], Any], count: Optional[int] = None, rising: bool = False) -> None:
        self.kind, self.count, self.rising = kind, count, rising

    def __call__(self, value: Any) -> List[Any]:
        if not isinstance(value, (list, tuple)) or (self.count and len(value) != self.count):
            raise argparse.ArgumentTypeError(f'{value!r} is not {self}')
        values = [self.kind(v) for v in value]
        if self.rising and values != sorted(values):
            raise argparse.ArgumentTypeError(f'{value!r} is not {self}, the smallest first')
        return values

    def __str__(self) -> str:
        return f'{self.count or "several"} values, each {self.kind}'


class Device:
    """A device that torch has here; empty for CUDA where there is one, else the CPU."""

    def __call__(self, value: Any) -> str:
        if value == '':
            return value
        try:
            torch.zeros(1, device=torch.device(value)).item()  # the meta device has no items
        except Exception as e:  # torch raises RuntimeError, AssertionError, NotImplementedError, ...
            count = torch.cuda.device_count()
            here = ', '.join(['cpu', *(f'cuda:{i}' for i in range(count))])
            raise argparse.ArgumentTypeError(f'{value!r} cannot be used here; there is {here}') from e
        return value


class ModelName:
    """A model of timm's registry, with or without a tag, or one from elsewhere: hf-hub:OWNER/NAME, local-dir:DIR."""

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise argparse.ArgumentTypeError(f'{value!r} is no name of a model')
        source, colon, rest = value.partition(':')
        if colon and source in ('hf-hub', 'hf_hub'):
            try:
                validate_repo_id(rest.partition('@')[0])
            except HFValidationError as e:
                raise argparse.ArgumentTypeError(f'{value!r} names no repository: give {source}:OWNER/NAME') from e
            return value
        if colon and source == 'local-dir':
            if not (Path(rest) / 'config.json').is_file():
                raise argparse.ArgumentTypeError(
                    f'{value!r}: there is no config.json; give a folder that `timm-densese publish --output` wrote')
            return value
        name, _, tag = value.partition('.')
        if not timm.is_model(name):
            near = close_matches(name, timm.list_models())
            raise argparse.ArgumentTypeError(
                f'{value!r} is no model of timm or of this package{near} (a model of your own: give --device-modules)')
        tags = [full.partition('.')[2] for full in timm.list_models(f'{name}.*', include_tags=True)]
        if tag and tag not in tags:
            raise argparse.ArgumentTypeError(f'{name} has no tag {tag!r}{close_matches(tag, tags)}')
        return value


class ModuleName:
    """A Python module, imported for what it registers: `--device-modules`, as of timm's train.py."""

    def __call__(self, value: Any) -> str:
        if os.getcwd() not in sys.path and '' not in sys.path:
            sys.path.append(os.getcwd())  # where `python -m` would look, and an installed command does not
        try:
            importlib.import_module(value)
        except Exception as e:  # whatever the module raises
            why = f'{type(e).__name__}: {first_line(e)}'
            raise argparse.ArgumentTypeError(f'{value!r} cannot be imported ({why})') from e
        return value

    def __str__(self) -> str:
        return 'the name of a module'


class Augmentation:
    """A policy of timm's automatic augmentation; empty for none."""

    def __call__(self, value: Any) -> str:
        try:
            create_transform((3, 224, 224), is_training=True, auto_augment=value)
        except Exception as e:
            raise argparse.ArgumentTypeError(
                f'{value!r} is no automatic augmentation; give rand-m9-mstd0.5 or the like, augmix-m3, original, '
                f'originalr, v0, v0r or 3a') from e
        return value


def parse_argument(text: str) -> Tuple[str, Any]:
    """Read NAME=VALUE, a value being Python's, or text.

    Raises:
        ArgumentTypeError: It is not that.

    Example:
        >>> parse_argument('block_config=(2,3)'), parse_argument('se_placement=stage')
        (('block_config', (2, 3)), ('se_placement', 'stage'))
    """
    name, equals, value = text.partition('=')
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def check(option: str, kind: Callable[[Any], Any], value: Any) -> Any:
    """Give the value of an option as its kind has it.

    Raises:
        OptionError: It cannot be used.
    """
    try:
        return kind(value)
    except argparse.ArgumentTypeError as e:
        raise OptionError(f'{option}: {e}') from e


def close_matches(name: Any, names: Iterable[str], shown: int = 12) -> str:
    """Say which of some names are meant, as the end of a sentence: those that are close, or all where they are few."""
    names = sorted(set(names))
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=.6)
    if close:
        return f'; did you mean {" or ".join(close)}?'
    if len(names) <= shown:
        return f'; choose one of {", ".join(names)}'
    return f'; the nearest are {", ".join(difflib.get_close_matches(str(name), names, n=3, cutoff=0))}'


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    if isinstance(error, KeyError):  # its message is the key alone
        return f'there is no {error}'
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def option_errors(given: str, advice: str = '') -> Iterator[None]:
    """Report what timm or torch raises while something is constructed as the error of the option that asked for it.

    Args:
        given: The option and its value.
        advice: What to do.

    Raises:
        OptionError: Something was raised. Errors that say what to do about a file or the Hub stay as they are.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) and not isinstance(e, ModelConfigError):
            raise
        raise OptionError(f'{given}: {first_line(e)}{f" {advice}" if advice else ""}') from e
