"""Hubs: what they have, which of it is used, and the store that it is kept in; the only room that opens a socket."""

from __future__ import annotations
