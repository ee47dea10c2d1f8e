"""For every room: errors, interrupts, progress, devices and processes."""
