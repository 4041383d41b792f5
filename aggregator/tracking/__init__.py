"""Where rounds are written down for experiment trackers: JSON Lines always, others if asked for.

    Tracker ──a thread for each sink──▶ Sink.log(round, values)

A sink is told of rounds that have ended, in order, each once over all restarts. It has a thread and
a view of the state of its own: however slow or broken a tracker is, no merge waits for it.
"""
