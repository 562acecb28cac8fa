"""The errors a user meets.

Two kinds, because they ask for different actions: an :class:`InputError` is mended by changing what was asked
(a path, a setting, a corpus), an :class:`IntegrityError` says that stored bytes are not what was written.
"""

from __future__ import annotations


class InputError(ValueError):
    """What the caller gave cannot be used. Commands print it and exit with 2."""


class NotHereError(InputError):
    """It is not there, or a package that it needs is not installed. Another machine may see it, or have the package."""


class IntegrityError(ValueError):
    """Stored bytes fail a checksum or break an invariant of the format. Commands print it and exit with 1."""
