"""Upstream notes that no user of mcore can act on, kept out of the terminal.

Megatron-core warns at import about optional packages and logs its own deprecations; what is missing
is said by `mcore doctor`. `--logging_level` brings megatron's log back.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("megatron", "torch.utils.cpp_extension", "torch.distributed.elastic", "datasets")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import without warnings about optional packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_logs(level: str | None = None) -> None:
    """Set upstream loggers to `level`, ERROR by default, and drop megatron's own warnings."""
    value = logging.getLevelNamesMapping()[level.upper()] if level else logging.ERROR
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(value)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    warnings.filterwarnings("ignore", message=r".*grad attribute of a Tensor that is not a leaf.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
