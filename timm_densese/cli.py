"""The command line: runs a command, and says on standard error what went wrong."""
import io
import os
import sys
from typing import List, Optional

from . import options
from .commands import create_parser
from .errors import OptionError, UserError

# What commands import when they run -> the extra that brings it.
_EXTRAS = {'sklearn': 'report', 'scipy': 'report', 'matplotlib': 'report', 'cv2': 'report', 'faiss': 'report',
           'pytorch_grad_cam': 'explain', 'gradio': 'serve'}


def main(argv: Optional[List[str]] = None) -> int:
    """Run `timm-densese`.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0; 1 where the input was at fault, 2 where an option was, 130 after Ctrl-C, 141 where nobody reads
        the output. Standard error says why.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files that its encoding lacks are escaped
            stream.reconfigure(errors='backslashreplace')
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Optional[List[str]]) -> int:
    try:
        args = create_parser().parse_args(argv)
        for module in getattr(args, 'device_modules', None) or []:
            options.check('--device-modules', options.ModuleName(), module)
        return args.run(args) or 0
    except UserError as e:
        print(f'timm-densese: {e}', file=sys.stderr)
        return 2 if isinstance(e, OptionError) else 1
    except KeyboardInterrupt as e:
        sys.unraisablehook = lambda _: None  # torch's loaders complain when they were stopped half-made
        print(f'\ntimm-densese: stopped. {str(e) or "Nothing half-done is left: run the same command again."}',
              file=sys.stderr)
        return 130
    except ModuleNotFoundError as e:
        extra = _EXTRAS.get((e.name or '').split('.')[0])
        if extra is None:
            raise
        print(f'timm-densese: this needs {e.name}: pip install "timm-densese[{extra}]"', file=sys.stderr)
        return 1
    except OSError as e:
        if isinstance(e, BrokenPipeError) or e.strerror is None:
            raise
        where = f'{e.filename}: ' if e.filename else ''
        print(f'timm-densese: {where}{e.strerror}. Look at the file or the disk, and run the same command again.',
              file=sys.stderr)
        return 1
