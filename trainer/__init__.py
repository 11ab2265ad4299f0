"""Training: models, losses, reference log-probs, the loop, checkpoints and the command-line entry points."""
