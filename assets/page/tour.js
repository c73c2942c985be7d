// The first visit: three steps, dismissed for good.
