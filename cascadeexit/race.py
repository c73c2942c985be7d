"""A fair race on one device: the two sides never run at once, and the side whose own clock is behind goes next."""

from collections.abc import Iterator, Mapping

from cascadeexit.events import TokenEvent


def race(sides: Mapping[str, Iterator[TokenEvent]]) -> Iterator[tuple[str, TokenEvent]]:
    """Interleave event streams by their own engine time.

    Each stream's `seconds` count only its own work, so a slow side does not delay the other's clock, and events come
    out in the order in which they would have happened on two equal machines. Streams are closed when the race is.
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
