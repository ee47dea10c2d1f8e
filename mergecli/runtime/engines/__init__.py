"""Engines: where units of work run. `contract` says what one is, `local` and `ray` are its dialects, `grid` is the loop above."""
