// Both texts aligned by tokens, also after they have parted.
