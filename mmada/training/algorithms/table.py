"""The one table of algorithms."""

from mmada.training.algorithms.base import Algorithm
from mmada.training.algorithms.dr_grpo import DR_GRPO
from mmada.training.algorithms.grpo import GRPO
from mmada.training.algorithms.ppo import PPO
from mmada.training.algorithms.reinforce import REINFORCE
from mmada.training.algorithms.rloo import RLOO

ALGORITHMS: dict[str, Algorithm] = {each.name: each for each in (PPO, GRPO, DR_GRPO, RLOO, REINFORCE)}
