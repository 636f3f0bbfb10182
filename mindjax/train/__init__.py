"""What every training loop shares: state, step, optimizer, checkpoints, metrics, and the loop around them."""
