"""Training of vision towers: settings, images, low-rank adapters, steps, and the state that interrupted ones leave."""

from __future__ import annotations
