"""What a user can mend."""

from __future__ import annotations


class FptqError(ValueError):
    """A mistake of the user's, or a file or machine that does not do what was asked of it. Its message is one line that
    says what is wrong and what to do, and is shown as it is; any other exception is a fault of ours.

    param: the name of the request field, option or argument that is wrong, where one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
