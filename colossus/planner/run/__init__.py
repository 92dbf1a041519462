"""From a step to a whole run: failures, days, energy, water, carbon, dollars. `account.py` puts it together."""
