"""What every room needs: errors, interrupts, progress, devices and processes."""
