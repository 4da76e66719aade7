"""The one training loop, its engines, checkpoints, schedules, the process group and the monitor."""
