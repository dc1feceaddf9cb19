"""Train part of a TensorFlow/Keras 3 model, and pay only for that part.

The public names are those of `tapeloop/_public.py`, imported when the first of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tapeloop._version import __version__ as __version__

if TYPE_CHECKING:
    from tapeloop._public import *  # noqa: F403
else:
    # TensorFlow takes seconds to import, and commands that only read files do not need it. Python asks a module for a
    # name that it does not have by its `__getattr__`: https://peps.python.org/pep-0562
    def __getattr__(name: str) -> Any:
        # Python and notebooks look for many of their own names, which are none of these.
        if name[0] == "_" and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module("tapeloop._public")
        here = globals()
        here.update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
        if name not in here:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return here[name]

    def __dir__() -> list[str]:
        # What an editor or a shell completes: modules that were imported along the way are none of the user's.
        return [*__getattr__("__all__"), "__version__"]
