"""Activation memory of training: what a model holds, and plans that make it fit into a budget."""

from fastsr.memory.accounting import Account, account
from fastsr.memory.budgeting import budget
from fastsr.memory.measuring import Memory, measure, simulate
from fastsr.memory.planning import Applied, BudgetError, Plan, clear, plan

__all__ = ["Account", "Applied", "BudgetError", "Memory", "Plan", "account", "budget", "clear", "measure", "plan", "simulate"]
