// The timeline: each pass on a time axis, one lane for each side.
