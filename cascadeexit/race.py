"""A fair race on one device: the sides never run at once, and the side with the least engine time so far runs next."""

from collections.abc import Iterator, Mapping

from cascadeexit.events import TokenEvent


def race(sides: Mapping[str, Iterator[TokenEvent]]) -> Iterator[tuple[str, TokenEvent]]:
    """Interleave streams of events by their engine time. Yields (side, event).

    The `seconds` of a stream count only its own work, so events come in the order that they would have if each side
    had an equal machine of its own. Closing the race closes the streams.
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
