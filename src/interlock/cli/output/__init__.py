"""Output for people: formatting, progress, refusals, hints, confirmation."""
