"""Where torch computes."""

from __future__ import annotations

from mergecli.errors import UsageError


def usable_device(name: str) -> str:
    """The name, once it is sure that torch has such a device here.

    Raises:
        UsageError: it has not.
    """
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device `{name}`: cannot be used here", "`cpu` always works; `cuda` needs a GPU"
        ) from error
    return name
