"""Where the step runs: process group, device, DeepSpeed, the averaged teacher, checkpoints."""
