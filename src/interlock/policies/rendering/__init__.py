"""Policies as tables, diagrams and pages."""
