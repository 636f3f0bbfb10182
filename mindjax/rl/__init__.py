"""Reinforcement learning with verifiable rewards: rollouts, rewards, advantages and the GSPO main loop."""
