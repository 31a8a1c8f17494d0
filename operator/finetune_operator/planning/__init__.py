"""Pure decisions: ``plan(observation, config) -> Plan``. No clock, no client, no environment in here."""

from finetune_operator.planning.chain import plan
from finetune_operator.planning.model import Observation, Plan, PlannerConfig

__all__ = ["Observation", "Plan", "PlannerConfig", "plan"]
