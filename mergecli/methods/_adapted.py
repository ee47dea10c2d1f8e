"""Methods that learn their coefficients or masks on images without labels: AdaMerging, Concrete."""

from __future__ import annotations

from dataclasses import dataclass

from mergecli.methods._kinds import Looking


@dataclass(frozen=True)
class Adapted(Looking):
    """What methods share that adapt first; what they learnt is kept as a file and can be applied without images."""
