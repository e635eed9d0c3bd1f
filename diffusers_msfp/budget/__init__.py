"""A budget instead of patterns: bits and formats for each layer by what they do to the output."""

from .plan import plan_budget
from .record import PLAN_FILE, BudgetPlan

__all__ = ["PLAN_FILE", "BudgetPlan", "plan_budget"]
