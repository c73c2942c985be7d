// Lines of the stream as they come over the wire, as records with names.

const expand = line => line;
