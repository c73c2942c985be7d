"""Race: several runs take turns on one device, so that their speeds can be compared.

Two runs never compute at the same time. The run that has used the least engine time so far goes next.
"""

from collections.abc import Iterator, Mapping

from cascadeexit.events import TokenEvent


def race(sides: Mapping[str, Iterator[TokenEvent]]) -> Iterator[tuple[str, TokenEvent]]:
    """Let several runs take turns, and merge their events. Yields (name of the run, event).

    Engine time is the time that the engine worked for one run; an event has it in the field `seconds`. The next event
    always comes from the run that has used the least engine time so far. Closing this generator closes the runs.

    sides: {name of a run: its events, from `Engine.generate`}.
    """
    clocks = dict.fromkeys(sides, 0.0)
    try:
        while clocks:
            name = min(clocks, key=clocks.get)
            event = next(sides[name], None)
            if event is None:
                del clocks[name]
            else:
                clocks[name] = event.seconds
                yield name, event
    finally:
        for stream in sides.values():
            stream.close()
