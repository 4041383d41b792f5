"""What a device's owner allows: when to train, when to transfer, and how much of it a day.

owner.py    the file that the owner writes    hours.py    windows of the week
decide.py   what it comes to now: pure        sensors.py  power, heat, load and network
used.py     what of today's share is used     polite.py   what the agent asks
"""
