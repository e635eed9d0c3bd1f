"""A budget instead of patterns: bits and formats for each layer by what they do to the output."""

from .plan import plan_budget
from .record import BudgetPlan

__all__ = ["BudgetPlan", "plan_budget"]
