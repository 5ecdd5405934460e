"""The one family of errors a user can cause.

Each is raised with a single line that says what is wrong and, where it helps, what to do. The
command line prints that line and exits with status 2; anything else that escapes is a bug.
"""


class HalfbyteError(Exception):
    """Base of every error that a user, a file or a machine can cause."""


class KvWarning(UserWarning):
    """A kv mode was asked for that was measured to change this model's answers too much."""


class FormatError(HalfbyteError):
    """A `.hb` file is damaged, hostile, or newer than this build understands."""


class CheckpointError(HalfbyteError):
    """A source checkpoint is missing, truncated, inconsistent or of an unsupported kind."""


class TokenizerError(HalfbyteError):
    """A tokenizer is missing, unreadable, or does not match its model."""


class UsageError(HalfbyteError):
    """A request makes no sense: an unknown option, a value out of range, a context overflow."""
