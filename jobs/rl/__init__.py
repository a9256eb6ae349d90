"""Reinforcement learning: who samples, who scores, who learns, and what they tell each other. See ``jobs.ppo``."""
