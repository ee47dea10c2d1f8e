"""Training of vision towers: settings, data, LoRA, the loop, and its resume file."""

from __future__ import annotations
