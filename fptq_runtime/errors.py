"""What a user can mend."""

from __future__ import annotations

import re
from collections.abc import Mapping


class FptqError(ValueError):
    """A mistake of the user's, or a file or machine that does not do what was asked of it. Its message is one line that
    says what is wrong and what to do, and is shown as it is; any other exception is a fault of ours.

    param: the name of the request field, option or argument that is wrong, where one is. others: further ones that the
    message names.
    """

    def __init__(self, message: str, param: str | None = None, *others: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote what a file or a client has
        self.param = param
        self._named = (*(() if param is None else (param,)), *others)

    def spelled(self, names: Mapping[str, str]) -> str:
        """The message with its parameters' names as a user writes them, as --max-model-len for max_model_len."""
        known = "|".join(re.escape(name) for name in self._named if name in names)
        return re.sub(rf"(?<![\w/.-])({known})(?![\w/-])", lambda m: names[m[0]], str(self)) if known else str(self)
