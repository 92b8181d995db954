"""`import fptq`: what `fptq_runtime` offers, by the command's name. Modules in it have the one name, fptq_runtime.…"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fptq_runtime import __all__, __getattr__, __version__  # noqa: F401

if TYPE_CHECKING:
    from fptq_runtime import *  # noqa: F403
