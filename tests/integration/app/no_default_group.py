"""Mixed into ranks. Their import of it, before they form any group, shuts the way to torch's default one."""

from __future__ import annotations

from tests import default_group

default_group.shut()


class Shut:
    """Says whether it still is."""

    def default_group_is_shut(self) -> bool:
        return default_group.is_shut()
