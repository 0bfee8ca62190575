"""One file per method: its contract, its formula and its metrics. Floor 2."""
