"""Virtual devices: the agent's own code on the time, link, memory and power of a trace."""
