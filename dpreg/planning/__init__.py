"""Analyses compiled programs: their collectives, memory and cost, also for chips that this machine does not have."""
